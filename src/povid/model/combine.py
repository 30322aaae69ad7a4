"""Several LoRAs, one upon the other, as a single one: their exact sum, from their files alone.

Stage 2 trains a new LoRA on a model that has stage 1's in its weights: W + s_1 B_1 A_1 + s_2 B_2 A_2. That is
W + s [B_1 B_2] [A_1; A_2], a LoRA whose rank is the sum of both. Of a module that was trained as a whole (peft's
``modules_to_save``, here the projector) the last adapter that trained it has the final weights.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from povid.fault import Fault
from povid.files import read_json, write_json
from povid.model.adapters import new_folder, tensors

CURE = "name the folder of an adapter"
INSTEAD = "write a full checkpoint with `merge` instead"
# Settings of a LoRA that say which layers it is on; combined adapters that differ in them name their layers one by one.
WHERE = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
# Settings that change neither what a saved LoRA computes nor how it is read, or that are accounted for.
HANDLED = {
    *WHERE,
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "lora_alpha",
    "lora_dropout",
    "modules_to_save",
    "peft_version",
    "r",
    "revision",
    "task_type",
    "use_rslora",
}
PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")  # of A and B; other ones change the base model's weights
SIDES = (".lora_A.weight", ".lora_B.weight")


def combine(adapters: Sequence[Path], out: Path, *, base: str | None = None) -> None:
    """Write one LoRA in peft's format that does what several do one upon the other, in their order.

    Where all have the same scaling (alpha / r) their matrices are taken as they are; otherwise it is multiplied into B,
    and a number of B is rounded once, to float32. A layer that not all of them cover gets zeros in the others' places.

    Args:
        base: the model that ``adapter_config.json`` will name; None for the one that all adapters name.

    Raises:
        Fault: fewer than two adapters, one cannot be read or does something that a sum of LoRAs cannot, they name
            different base models, or ``out`` exists or cannot be written.
    """
    from safetensors.torch import save_file

    if len(adapters) < 2:
        raise Fault(f"{adapters[0]} is a single adapter, so there is nothing to combine; use it as it is")
    configs = [_config(adapter) for adapter in adapters]
    if rounded := [adapter for adapter in adapters[1:] if _rounds(adapter)]:
        raise Fault(
            f"{rounded[0]} was trained with model.merge={_rounds(rounded[0])}, on weights into which the adapter "
            f"before it was rounded, and a sum does not round; {INSTEAD}"
        )
    names = list(dict.fromkeys(config.get("base_model_name_or_path") for config in configs))
    if base is None and len(names) > 1:
        raise Fault(
            f"the adapters were trained on different models ({', '.join(map(str, names))}); name the one that they "
            "build on with --base"
        )
    loras, wholes = zip(*(_parts(adapter, config["r"]) for adapter, config in zip(adapters, configs)))
    whole = {name: tensor for found in wholes for name, tensor in found.items()}
    saved = sorted({name for config in configs for name in config.get("modules_to_save") or ()})
    if nested := sorted(name for name in whole if sum(f".{module}." in name for module in saved) > 1):
        raise Fault(
            f"the adapters trained modules inside each other as a whole ({nested[0]}), which peft cannot load as one "
            f"adapter; {INSTEAD}"
        )
    layers = sorted({layer for lora in loras for layer in lora})
    for layer in layers:
        _check(layer, [lora[layer] for lora in loras if layer in lora], f"{layer}.weight" in whole)
    alpha, ranks = _common_alpha(configs), [config["r"] for config in configs]
    factors = [1.0 if alpha else _factor(config) for config in configs]
    combined: dict[str, Tensor] = dict(whole)
    for layer in layers:
        sides = _stacked([lora.get(layer) for lora in loras], ranks, factors)
        combined |= {f"{layer}{end}": side for end, side in zip(SIDES, sides)}
    config = configs[-1] | {
        "base_model_name_or_path": base or names[0],
        "inference_mode": True,
        "lora_alpha": alpha or sum(ranks),
        "modules_to_save": saved or None,
        "r": sum(ranks),
        "use_rslora": False,
    }
    if any(one.get(key) != configs[0].get(key) for one in configs for key in WHERE):
        config |= dict.fromkeys(WHERE) | {
            "target_modules": [layer.removeprefix("base_model.model.") for layer in layers]
        }
    with new_folder(out) as folder:
        save_file(combined, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        write_json(folder / "adapter_config.json", config)


def _config(adapter: Path) -> dict[str, Any]:
    """An adapter's settings. Raises Fault if they ask for what a sum of LoRAs cannot do."""
    from peft import LoraConfig

    file = adapter / "adapter_config.json"
    config = read_json(file, dict, CURE, ("peft_type", "r", "lora_alpha"))
    usual = LoraConfig().to_dict()
    usual["peft_type"] = "LORA"
    unusual = [
        f"{key}={value!r}"
        for key, value in config.items()
        if key not in HANDLED
        and value not in (usual.get(key), None, False, {}, [])
        and not (key == "init_lora_weights" and value in PLAIN_STARTS)
    ]
    if unusual:
        raise Fault(f"{file}: a sum of LoRAs cannot hold {', '.join(unusual)}; {INSTEAD}")
    return config


def _rounds(adapter: Path) -> str | None:
    """The setting model.merge that a stage's adapter was trained with; None where nothing says so."""
    try:
        return json.loads((adapter.parent / "stage.json").read_text(encoding="utf-8"))["identity"]["parts"][
            "model.merge"
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _parts(adapter: Path, rank: int) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """(A, B) of each layer, and the weights of modules that were trained as a whole."""
    sides: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}
    full = {}
    for name, tensor in tensors(adapter):
        side = next((number for number, end in enumerate(SIDES) if name.endswith(end)), None)
        if side is not None:
            sides[side][name.removesuffix(SIDES[side])] = tensor
        elif "lora_" in name:
            raise Fault(f"{adapter}: a sum of LoRAs cannot hold {name}; {INSTEAD}")
        else:
            full[name] = tensor
    if alone := sorted(sides[0].keys() ^ sides[1].keys()):
        raise Fault(f"{adapter} is damaged: A or B of {alone[0]} is missing; restore it from a copy")
    for layer, a in sides[0].items():
        if (a.shape[0], sides[1][layer].shape[1]) != (rank, rank):
            raise Fault(f"{adapter} is damaged: its rank is {rank}, and not that of {layer}; restore it from a copy")
    return {layer: (a, sides[1][layer]) for layer, a in sides[0].items()}, full


def _check(layer: str, pairs: Sequence[tuple[Tensor, Tensor]], whole: bool) -> None:
    """Raise a Fault if the LoRAs on a layer do not fit together, or the layer was also trained as a ``whole``."""
    if whole:
        raise Fault(
            f"one of the adapters has a LoRA on {layer} and another one trained it as a whole; their sum is no LoRA; "
            f"{INSTEAD}"
        )
    if len({(a.shape[1:], b.shape[0]) for a, b in pairs}) > 1:
        raise Fault(f"{layer} has other sizes in one adapter than in another; name adapters of the same base model")


def _common_alpha(configs: Sequence[Mapping[str, Any]]) -> float | int | None:
    """The alpha of the sum if all adapters scale alike, so that B need not change; else None."""
    if any(config.get("use_rslora") for config in configs):
        return None
    alphas = [config["lora_alpha"] for config in configs]
    ratios = {Fraction(alpha) / config["r"] for alpha, config in zip(alphas, configs)}
    return sum(alphas) if len(ratios) == 1 else None


def _factor(config: Mapping[str, Any]) -> float:
    """What a LoRA multiplies B A by."""
    return config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])


def _stacked(
    pairs: Sequence[tuple[Tensor, Tensor] | None], ranks: Sequence[int], factors: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """[A_1; A_2; ...] and [f_1 B_1, f_2 B_2, ...] of one layer, zeros where an adapter does not cover it."""
    any_a, any_b = next(pair for pair in pairs if pair is not None)
    above, beside = [], []
    for pair, rank, factor in zip(pairs, ranks, factors):
        if pair is None:
            pair = any_a.new_zeros(rank, *any_a.shape[1:]), any_b.new_zeros(any_b.shape[0], rank, *any_b.shape[2:])
        a, b = pair
        above.append(a)
        beside.append(b if factor == 1 else (b.double() * factor).to(torch.promote_types(b.dtype, torch.float32)))
    kind = functools.reduce(torch.promote_types, (part.dtype for part in (*above, *beside)))
    return torch.cat([a.to(kind) for a in above]), torch.cat([b.to(kind) for b in beside], 1).contiguous()
