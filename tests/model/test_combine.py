"""Several LoRAs as one: the exact sum, for plain peft and for transformers, or one sentence why there is none."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_adapters import logits
from transformers import AutoModelForImageTextToText

from povid.adapters import main
from povid.fault import Fault
from povid.files import read_json, write_json
from povid.model.combine import combine

PREFIX = "base_model.model."


def plain(base):
    return AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)


def trained(model, folder, seed, **lora):
    """A LoRA of any kind on a model, as training leaves it; its folder."""
    torch.manual_seed(seed)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora))
    for parameter in (p for p in adapted.parameters() if p.requires_grad):
        parameter.data += 0.05 * torch.randn_like(parameter)
    adapted.save_pretrained(str(folder))
    return folder


ALL = r"model\.language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
KINDS = {
    "both stages alike, each with its projector": (
        {"r": 4, "lora_alpha": 8, "target_modules": ALL, "modules_to_save": ["multi_modal_projector"]},
        {"r": 4, "lora_alpha": 8, "target_modules": ALL, "modules_to_save": ["multi_modal_projector"]},
    ),
    "other ranks and scalings, and no projector after the first": (
        {"r": 4, "lora_alpha": 8, "target_modules": ALL, "modules_to_save": ["multi_modal_projector"]},
        {"r": 3, "lora_alpha": 7, "target_modules": ALL},
    ),
    "rank-stabilized, on other layers, and three of them": (
        {"r": 2, "lora_alpha": 6, "target_modules": r"model\.language_model\..*\.(q_proj|v_proj)", "use_rslora": True},
        {"r": 4, "lora_alpha": 8, "target_modules": ALL},
        {"r": 1, "lora_alpha": 1, "target_modules": r"model\.language_model\..*\.down_proj"},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_sum_is_exact(kind, base, tmp_path, example, capsys):
    """Against the stages as a run computes with them, one merged after the other: loaded by peft and transformers."""
    chain = []
    for number, lora in enumerate(KINDS[kind]):
        below = tiny.settings(base).load_model(chain)
        chain.append(trained(below, tmp_path / f"{number}" / "adapter", number, **lora))
    together = tmp_path / "together"
    assert main(["combine", *map(str, chain), "--out", str(together)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(together)

    by_stage = logits(tiny.settings(base).load_model(chain), example)
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(plain(base), str(together)), example), by_stage, **close
    )
    model = plain(base)
    found = model.load_adapter(str(together))
    assert not found.missing_keys and not found.unexpected_keys
    torch.testing.assert_close(logits(model, example), by_stage, **close)
    assert not torch.allclose(logits(tiny.settings(base).load_model(chain[:-1]), example), by_stage, atol=1e-2)

    config = read_json(together / "adapter_config.json", dict, "")
    assert config["r"] == sum(lora["r"] for lora in KINDS[kind]) and not config["use_rslora"]
    sums = load_file(together / "adapter_model.safetensors")
    parts = [load_file(folder / "adapter_model.safetensors") for folder in chain]
    for layer in {name.removesuffix(".lora_A.weight") for part in parts for name in part if name.endswith("A.weight")}:
        delta = sum(
            part[f"{layer}.lora_B.weight"].double()
            @ part[f"{layer}.lora_A.weight"].double()
            * lora["lora_alpha"]
            / (lora["r"] ** 0.5 if lora.get("use_rslora") else lora["r"])
            for part, lora in zip(parts, KINDS[kind])
            if f"{layer}.lora_A.weight" in part
        )
        ours = sums[f"{layer}.lora_B.weight"].double() @ sums[f"{layer}.lora_A.weight"].double()
        torch.testing.assert_close(ours * config["lora_alpha"] / config["r"], delta, rtol=0, atol=1e-7)
        assert sums[f"{layer}.lora_A.weight"].shape[0] == config["r"]  # one rank for all layers: vLLM knows no other
    for name in (name for part in parts for name in part if "projector" in name):
        assert torch.equal(sums[name], [part[name] for part in parts if name in part][-1])


def test_alike_stages_keep_their_numbers(base, tmp_path):
    """With one scaling nothing is rounded: A and B are the stages' own, one after the other."""
    lora = {"r": 3, "lora_alpha": 4, "target_modules": r"model\.language_model\..*\.q_proj"}
    chain = [trained(plain(base), tmp_path / str(number), number, **lora) for number in (1, 2)]
    combine(chain, tmp_path / "sum")
    config, sums = (
        read_json(tmp_path / "sum/adapter_config.json", dict, ""),
        load_file(tmp_path / "sum/adapter_model.safetensors"),
    )
    assert (config["r"], config["lora_alpha"]) == (6, 8) and config["target_modules"] == lora["target_modules"]
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in chain)
    for name, tensor in sums.items():
        assert torch.equal(tensor, torch.cat([one[name], two[name]], int("lora_B" in name)))


@pytest.fixture
def pair(tmp_path):
    """Two small adapters in files, to be spoilt."""
    found = []
    for number in (1, 2):
        folder = tmp_path / f"stage_{number}" / "adapter"
        folder.mkdir(parents=True)
        layers = {f"{PREFIX}l.lora_A.weight": torch.ones(2, 5), f"{PREFIX}l.lora_B.weight": torch.ones(3, 2)}
        save_file(layers, folder / "adapter_model.safetensors")
        write_json(
            folder / "adapter_config.json",
            {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["l"], "base_model_name_or_path": "a/b"},
        )
        found.append(folder)
    return found


def test_what_is_no_sum_of_loras_is_refused_in_a_sentence(pair, tmp_path):
    second = pair[1]
    config = read_json(second / "adapter_config.json", dict, "")
    whole = load_file(second / "adapter_model.safetensors")
    a, b = f"{PREFIX}l.lora_A.weight", f"{PREFIX}l.lora_B.weight"
    cases = [
        ({"use_dora": True}, {}, r"cannot hold use_dora=True; write a full checkpoint with `merge`"),
        ({"bias": "all", "peft_type": "LOHA"}, {}, r"cannot hold peft_type='LOHA', bias='all'"),
        (
            {"rank_pattern": {"l": 1}, "init_lora_weights": "pissa"},
            {},
            r"rank_pattern=\{'l': 1\}, init_lora_weights='pissa'",
        ),
        ({"r": 4}, {}, r"is damaged: its rank is 4, and not that of base_model.model.l"),
        ({"base_model_name_or_path": "c/d"}, {}, r"trained on different models \(a/b, c/d\); .* with --base"),
        (
            {},
            {f"{PREFIX}l.lora_magnitude_vector": torch.ones(3)},
            r"cannot hold base_model.model.l.lora_magnitude_vector",
        ),
        ({}, {a: torch.ones(2, 6)}, r"base_model.model.l has other sizes in one adapter than in another"),
        ({}, {b: None}, r"is damaged: A or B of base_model.model.l is missing"),
        (
            {"modules_to_save": ["p", "p.q"]},
            {f"{PREFIX}p.q.weight": torch.ones(3)},
            r"modules inside each other as a whole \(base_model.model.p.q.weight\)",
        ),
        (
            {},
            {a: None, b: None, f"{PREFIX}l.weight": torch.ones(3, 5)},
            r"has a LoRA on base_model.model.l and another one trained it as a whole",
        ),
    ]
    for settings, tensors, said in cases:
        write_json(second / "adapter_config.json", config | settings)
        changed = {name: tensor for name, tensor in (whole | tensors).items() if tensor is not None}
        save_file(changed, second / "adapter_model.safetensors")
        with pytest.raises(Fault, match=said):
            combine(pair, tmp_path / "out")
    with pytest.raises(Fault, match=r"is a single adapter, so there is nothing to combine"):
        combine(pair[:1], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_stage_on_rounded_weights_is_refused(pair, tmp_path):
    """With model.merge the second stage started from weights into which the first had been rounded."""
    for merge in (None, "float16"):
        note = {"identity": {"parts": {"model.merge": merge}}}
        (pair[1].parent / "stage.json").write_text(json.dumps(note))
        if merge is None:
            combine(pair, tmp_path / "fine")
    with pytest.raises(Fault, match="trained with model.merge=float16"):
        combine(pair, tmp_path / "out")
