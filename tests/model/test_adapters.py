"""Adapters in peft's format, merged checkpoints, and checkpoints in original LLaVA's naming."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_models import whole
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from povid.adapters import main
from povid.fault import Fault
from povid.model.adapters import tensors, transformers_name
from povid.model.policy import Policy

PROJECTIONS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def logits(model, example):
    with torch.no_grad():
        return whole(Policy(model.eval(), None, tiny.settings("-"), adapted=False), *example)[1]


def saved_policy(base, folder, **changes):
    policy, _ = tiny.load(base, **changes)
    policy.save_adapter(folder)
    return policy.eval()


def test_keys_are_those_that_vllm_reads(base, tmp_path):
    """vLLM takes ``base_model.model.`` + transformers' name + ``.lora_A.weight`` or ``.lora_B.weight``."""
    prefix = "base_model.model.model"
    layers = {
        f"{prefix}.language_model.layers.{layer}.{name}.lora_{side}.weight"
        for layer in range(2)
        for name in PROJECTIONS
        for side in "AB"
    }
    projector = {f"{prefix}.multi_modal_projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
    for trained, rest, saved in ((True, projector, ["multi_modal_projector"]), (False, set(), None)):
        folder = tmp_path / f"projector_{trained}"
        saved_policy(base, folder, train_projector=trained)
        assert set(load_file(folder / "adapter_model.safetensors")) == layers | rest
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(base) and config["r"] == 4 and config["bias"] == "none"
        assert config["lora_alpha"] == 8 and config["modules_to_save"] == saved


def test_merged_checkpoint_gives_the_same_logits(base, tmp_path, example, capsys):
    """Two adapters, one upon the other, against the same two inside peft; the folder loads by itself."""
    first = saved_policy(base, tmp_path / "one")
    once = logits(first.network, example)
    assert main(["merge", str(tmp_path / "one"), "--out", str(tmp_path / "m1"), "--dtype", "float32"]) == 0
    torch.testing.assert_close(
        logits(AutoModelForImageTextToText.from_pretrained(tmp_path / "m1"), example), once, rtol=1e-4, atol=1e-4
    )
    second = saved_policy(tmp_path / "m1", tmp_path / "two")
    pair = [str(tmp_path / "one"), str(tmp_path / "two")]
    assert main(["merge", *pair, "--base", str(base), "--out", str(tmp_path / "m2"), "--dtype", "float32"]) == 0
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "m2")
    twice = logits(merged, example)
    torch.testing.assert_close(twice, logits(second.network, example), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(once, twice, atol=1e-2)
    processor = AutoProcessor.from_pretrained(tmp_path / "m2")
    assert processor.image_token_id == merged.config.image_token_id
    for file in ("processor_config.json", "tokenizer.json", "tokenizer_config.json"):  # whatever reads base reads this
        assert (tmp_path / "m2" / file).read_bytes() == (base / file).read_bytes()
    assert (tmp_path / "m2" / "generation_config.json").exists()
    config = json.loads((tmp_path / "m2" / "config.json").read_text())
    assert config["dtype"] == "float32" and str(tmp_path) not in json.dumps(config)
    on_disk = load_file(tmp_path / "m2" / "model.safetensors")  # llava-hf's own naming
    assert {"language_model.model.embed_tokens.weight", "multi_modal_projector.linear_1.weight"} <= set(on_disk)
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "m1"), str(tmp_path / "m2")]


def test_a_run_folder_is_merged_stage_by_stage(base, tmp_path, example):
    run = tmp_path / "run"
    for stage, init in ((1, []), (2, [str(run / "stage_1" / "adapter")])):
        (run / f"stage_{stage}").mkdir(parents=True)
        saved_policy(base, run / f"stage_{stage}" / "adapter")
        (run / f"stage_{stage}" / "stage.json").write_text(json.dumps({"init_from": init}))
    assert main(["merge", str(run), "--out", str(tmp_path / "out"), "--dtype", "float32"]) == 0
    pair = [str(run / f"stage_{stage}" / "adapter") for stage in (1, 2)]
    assert main(["merge", *pair, "--base", str(base), "--out", str(tmp_path / "again"), "--dtype", "float32"]) == 0
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def original_name(key: str) -> str:
    """The original LLaVA's name for transformers' name: the converter's rules in the other direction."""
    key = key.replace("model.multi_modal_projector.linear_1", "model.mm_projector.0")
    key = key.replace("model.multi_modal_projector.linear_2", "model.mm_projector.2")
    key = key.replace("model.vision_tower.", "model.vision_tower.vision_tower.vision_model.")
    return key.replace("model.language_model.", "model.")


@pytest.fixture
def released(base, tmp_path):
    """Stage one merged and stage two LoRA as the authors' scripts lay them out, and the model that they make."""
    torch.manual_seed(7)
    model = LlavaForConditionalGeneration.from_pretrained(base)
    words = model.config.image_token_id  # <image> is the first token that the original LLaVA does not have
    for name, parameter in model.named_parameters():
        if "vision_tower" not in name:
            shift = 0.05 * torch.randn_like(parameter)
            if name.endswith(("embed_tokens.weight", "lm_head.weight")):
                shift[words:] = 0
            parameter.data += shift
    state = {
        original_name(key): value[:words] if value.shape[:1] == (model.config.text_config.vocab_size,) else value
        for key, value in model.state_dict().items()
    }
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    stage_one = tmp_path / "POVID_stage_one_merged"
    stage_one.mkdir()
    names = sorted(state)
    for number, part in enumerate((names[::2], names[1::2]), 1):
        torch.save({key: state[key] for key in part}, stage_one / f"pytorch_model-0000{number}-of-00002.bin")

    path = tmp_path / "stage_one_in_transformers"
    model.save_pretrained(path)
    AutoProcessor.from_pretrained(base).save_pretrained(path)
    policy, _ = tiny.load(path)
    policy.eval()
    policy.save_adapter(tmp_path / "peft")
    theirs = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    stage_two = tmp_path / "POVID_stage_two_LoRa"
    stage_two.mkdir()
    lora = {original_name(key): value for key, value in theirs.items() if "lora_" in key}
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in lora
    torch.save(lora, stage_two / "adapter_model.bin")
    torch.save(
        {original_name(key): value for key, value in theirs.items() if "projector" in key},
        stage_two / "non_lora_trainables.bin",
    )
    (stage_two / "adapter_config.json").write_text(
        json.dumps(
            {
                "r": 4,
                "lora_alpha": 8,
                "lora_dropout": 0.05,
                "bias": "none",
                "peft_type": "LORA",
                "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            }
        )
    )
    return stage_one, stage_two, model, policy


def convert(base, released, out) -> int:
    stage_one, stage_two = map(str, released[:2])
    options = ["--lora", stage_two, "--base", str(base), "--out", str(out), "--dtype", "float32"]
    return main(["convert", stage_one, *options])


def test_released_checkpoints_are_converted(base, tmp_path, released, example):
    """LoRA's prefix once, in adapter_model.bin, then twice and with peft's adapter name, in safetensors."""
    _, stage_two, model, policy = released
    for number in (1, 2):
        if number == 2:
            lora = torch.load(stage_two / "adapter_model.bin")
            (stage_two / "adapter_model.bin").unlink()
            save_file(
                {f"base_model.model.{key.replace('.weight', '.default.weight')}": value for key, value in lora.items()},
                stage_two / "adapter_model.safetensors",
            )
        out, full = tmp_path / f"converted_{number}", tmp_path / f"full_{number}"
        assert convert(base, released, out) == 0
        converted = AutoModelForImageTextToText.from_pretrained(out / "model")
        assert torch.equal(logits(converted, example), logits(model, example))
        assert main(["merge", str(out / "adapter"), "--out", str(full), "--dtype", "float32"]) == 0
        merged = AutoModelForImageTextToText.from_pretrained(full)
        torch.testing.assert_close(logits(merged, example), logits(policy.network, example), rtol=1e-4, atol=1e-4)
        with policy.reference():
            assert not torch.allclose(logits(merged, example), logits(policy.network, example), atol=1e-2)


def test_a_lora_on_the_vision_tower_is_dropped_where_it_does_nothing(base, tmp_path, released, example, capsys):
    """Applying LoRA twice leaves new ones on the vision tower, with zeros in B: dropped with a word, if all zero."""
    assert convert(base, released, tmp_path / "plain") == 0
    assert "dropped" not in capsys.readouterr().err
    file = released[1] / "adapter_model.bin"
    lora = torch.load(file)
    for layer in range(3):
        for name in ("self_attn.q_proj", "mlp.fc1"):
            key = f"base_model.model.model.vision_tower.vision_tower.vision_model.encoder.layers.{layer}.{name}"
            lora |= {f"{key}.lora_A.weight": torch.randn(4, 24), f"{key}.lora_B.weight": torch.zeros(24, 4)}
    torch.save(lora, file)
    assert convert(base, released, tmp_path / "dropped") == 0
    assert (
        "note: dropped the LoRA of 6 layers outside the language model, such as model.vision_tower.encoder.layers.0."
        in (capsys.readouterr().err)
    )
    one, two = (load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("plain", "dropped"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)

    lora[f"{key}.lora_B.weight"][3, 1] = 2e-4
    torch.save(lora, file)
    assert convert(base, released, tmp_path / "refused") == 2
    said = capsys.readouterr().err
    assert (
        "trained on 1 layers outside the language model" in said
        and "encoder.layers.2.mlp.fc1 (B up to 2.0e-04)" in said
    )


def test_tokens_that_the_original_llava_does_not_have_keep_their_embeddings(base, tmp_path, released):
    options = ["--base", str(base), "--out", str(tmp_path / "c"), "--dtype", "float32"]
    assert main(["convert", str(released[0]), *options]) == 0
    assert not (tmp_path / "c" / "adapter").exists()
    ours = AutoModelForImageTextToText.from_pretrained(tmp_path / "c" / "model").get_input_embeddings().weight
    before = AutoModelForImageTextToText.from_pretrained(base).get_input_embeddings().weight
    first = released[2].config.image_token_id
    assert torch.equal(ours[first:], before[first:]) and not torch.equal(ours[:first], before[:first])


def test_names():
    for key, expected in {
        "model.layers.3.mlp.up_proj.weight": "model.language_model.layers.3.mlp.up_proj.weight",
        "model.norm.weight": "model.language_model.norm.weight",
        "lm_head.weight": "lm_head.weight",
        "model.mm_projector.0.bias": "model.multi_modal_projector.linear_1.bias",
        "base_model.model.model.mm_projector.2.weight": "model.multi_modal_projector.linear_2.weight",
        "base_model.model.base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": (
            "model.language_model.layers.0.self_attn.q_proj.lora_B.weight"
        ),
        "model.vision_tower.vision_tower.vision_model.pre_layrnorm.bias": "model.vision_tower.pre_layrnorm.bias",
    }.items():
        assert transformers_name(key) == expected


def damage(stage_one, stage_two, kind):
    first, lora = stage_one / "pytorch_model-00001-of-00002.bin", stage_two / "adapter_model.bin"
    if kind == "truncated":
        first.write_bytes(first.read_bytes()[:1000])
    elif kind == "half":
        first.unlink()
    elif kind == "empty":
        for file in stage_one.iterdir():
            file.unlink()
    elif kind == "shape":
        torch.save({"model.norm.weight": torch.ones(7)}, first)
    elif kind == "stranger":
        torch.save({"model.resampler.query": torch.ones(7)}, first)
    elif kind == "config":
        (stage_two / "adapter_config.json").write_text("{")
    elif kind == "partial":
        torch.save(dict(list(torch.load(lora).items())[:5]), lora)


def test_damaged_checkpoints_are_refused_in_a_sentence(base, tmp_path, released, capsys):
    for kind, said in {
        "truncated": r"pytorch_model-00001-of-00002.bin cannot be read",
        "half": r"POVID_stage_one_merged: \d+ of the model's tensors are missing",
        "empty": r"POVID_stage_one_merged contains no weights",
        "shape": r"model.norm.weight has the shape \(7,\) and the model's tensor \(32,\)",
        "stranger": r"model.resampler.query: the model has no tensor",
        "config": r"adapter_config.json cannot be read",
        "partial": r"POVID_stage_two_LoRa: \d+ of the adapter's tensors are missing",
    }.items():
        damaged = [shutil.copytree(folder, tmp_path / kind / folder.name) for folder in released[:2]]
        damage(*damaged, kind)
        out = tmp_path / f"{kind}_converted"
        assert convert(base, damaged, out) == 2, kind
        printed = capsys.readouterr().err.splitlines()[-1]  # progress bars come before it
        assert printed.startswith("error: ") and re.search(said, printed), (kind, printed)
        assert not out.exists() and not list(tmp_path.glob(f".{out.name}*")), kind


def test_an_existing_folder_is_not_overwritten(base, tmp_path, capsys):
    saved_policy(base, tmp_path / "a")
    assert main(["merge", str(tmp_path / "a"), "--out", str(tmp_path)]) == 2
    assert "exists" in capsys.readouterr().err
    assert main(["merge", str(tmp_path / "nothing"), "--out", str(tmp_path / "b")]) == 2
    assert "nothing contains neither" in capsys.readouterr().err


def test_tensors_of_an_empty_folder(tmp_path):
    with pytest.raises(Fault, match="contains no weights"):
        list(tensors(tmp_path))
