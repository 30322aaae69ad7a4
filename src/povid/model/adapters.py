"""Adapters in and out.

    python -m povid.adapters merge outputs/runs/RUN --out FOLDER       a full checkpoint, for transformers, vLLM, llava
    python -m povid.adapters convert STAGE_ONE --lora STAGE_TWO --base llava-hf/llava-1.5-7b-hf --out FOLDER

``merge`` writes model and processor. What training at a rate of 1e-7 adds is small beside the weights: rounded to
float16 (the default) the sum keeps it but for some per cent, to bfloat16 it loses a good part, and float32 keeps all.
The policy itself never merges in fewer than 32 bits.

``convert`` reads checkpoints in the original LLaVA's naming, such as those that the paper's authors released:
FOLDER/model is a full checkpoint in llava-hf's format and FOLDER/adapter, where a LoRA is given, an adapter in peft's
format to be used with ``adapters=[FOLDER/adapter] model.path=FOLDER/model``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from povid.fault import Fault
from povid.model.policy import DTYPES, ModelSettings, load_model, load_processor, lora_targets

# Original LLaVA's names to those of transformers (convert_llava_weights_to_hf.py, and llava/model/builder.py for the
# prefixes of adapters). LoRA applied twice leaves its prefix twice.
RENAMED = (
    (r"^(base_model\.model\.)+", ""),
    (r"^model\.model\.", "model."),
    (r"^model\.mm_projector\.0\.", "model.multi_modal_projector.linear_1."),
    (r"^model\.mm_projector\.2\.", "model.multi_modal_projector.linear_2."),
    (r"^model\.vision_tower\.vision_tower\.(vision_model\.)?", "model.vision_tower."),
    (r"^model\.(layers|embed_tokens|norm)\.", r"model.language_model.\1."),
)


def adapter_chain(place: Path) -> list[Path]:
    """All adapters that make up the policy in a run folder, a stage folder or an adapter folder."""
    if place.name == "adapter" and (place.parent / "stage.json").exists():
        place = place.parent
    stages = sorted(place.glob("stage_*/stage.json")) or [place / "stage.json"]
    if stages[-1].exists():
        stage = json.loads(stages[-1].read_text())
        return [*map(Path, stage["init_from"]), stages[-1].parent / "adapter"]
    if (place / "adapter_config.json").exists():
        return [place]
    raise Fault(
        f"init_from: {place} holds neither stage_*/stage.json nor adapter_config.json; name a run folder of a "
        "finished stage or an adapter folder"
    )


def transformers_name(key: str) -> str:
    """A tensor's name in original LLaVA's checkpoints as transformers calls it, adapter prefixes taken off."""
    for pattern, replacement in RENAMED:
        key = re.sub(pattern, replacement, key)
    return key


def tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every tensor in a checkpoint folder, one file in memory at a time.

    Raises:
        Fault: there is neither safetensors nor pytorch_model*.bin nor adapter_model.bin.
    """
    files = sorted(folder.glob("*.safetensors"))
    files = files or sorted([*folder.glob("pytorch_model*.bin"), *folder.glob("adapter_model.bin")])
    if not files:
        raise Fault(
            f"{folder} holds no weights (*.safetensors, pytorch_model*.bin or adapter_model.bin); name the "
            "folder that was downloaded"
        )
    for file in files:
        yield from _read(file).items()


def _read(file: Path) -> Mapping[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, SafetensorError) as error:
        raise Fault(f"{file} cannot be read ({str(error).splitlines()[0]}); download it again") from error


def merge(adapters: Sequence[Path], out: Path, *, base: str | None = None, dtype: str = "float16") -> None:
    """Write a full checkpoint (model and processor) of a base model with adapters merged into it, in their order.

    ``base`` None takes the model that the first adapter was trained on, by the name in its adapter_config.json.

    Raises:
        Fault: an adapter, the base model or their weights are not there, or ``out`` exists.
    """
    config = adapters[0] / "adapter_config.json"
    if base is None:
        if not config.exists():
            raise Fault(f"{adapters[0]} holds no adapter_config.json; name an adapter folder or a finished run")
        base = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise Fault(f"{config} does not say which model it was trained on; name it with --base")
    settings = ModelSettings(base, base, dtype=dtype)
    with _saved(out) as draft:
        model, processor = load_model(settings, adapters, merged=True), load_processor(settings)
        model.save_pretrained(draft)
        processor.save_pretrained(draft)


def convert(checkpoint: Path, out: Path, *, base: str, lora: Path | None = None, dtype: str = "float16") -> None:
    """Write a checkpoint in original LLaVA's naming as ``out/model`` and its LoRA, if there is one, as ``out/adapter``.

    Args:
        checkpoint: folder of full weights (``LlavaLlamaForCausalLM``). Its vision tower, where it holds one, is used.
        base: llava-hf's model of the same size: configuration, processor, vision tower and the embeddings of the
            tokens that original LLaVA lacks come from it.
        lora: folder with adapter_config.json, adapter_model and, where the projector was trained,
            non_lora_trainables.bin.

    Raises:
        Fault: a tensor has no place in the model or another shape, one that the model needs is missing, or ``out``
            exists.
    """
    settings = ModelSettings(base, base, dtype=dtype)
    with _saved(out) as draft:
        model, processor = load_model(settings), load_processor(settings)
        filled = set()
        for key, tensor in tensors(checkpoint):
            if not key.endswith(("rotary_emb.inv_freq", "position_ids")):
                filled.add(_fill(model, transformers_name(key), tensor, f"{checkpoint}: {key}"))
        needed = {name for name in model.state_dict() if "vision_tower" not in name}
        if needed - filled:
            raise Fault(
                f"{checkpoint} lacks {len(needed - filled)} of the model's tensors, the first is "
                f"{min(needed - filled)}; name a folder of full weights and give a LoRA with --lora"
            )
        model.save_pretrained(draft / "model")
        processor.save_pretrained(draft / "model")
        if lora is not None:
            _convert_lora(model, lora, str(out / "model")).save_pretrained(draft / "adapter")


def _convert_lora(model: nn.Module, lora: Path, base: str) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    file, projector = lora / "adapter_config.json", lora / "non_lora_trainables.bin"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        r, alpha, dropout = config["r"], config["lora_alpha"], config.get("lora_dropout", 0.0)
    except (OSError, ValueError, KeyError) as error:
        raise Fault(f"{file} cannot be read ({error!r}); --lora wants the folder of an adapter") from error
    model.name_or_path = base
    adapted = get_peft_model(
        model,
        LoraConfig(
            r=r,
            lora_alpha=alpha,
            lora_dropout=dropout,
            bias="none",
            target_modules=lora_targets(model),
            modules_to_save=["multi_modal_projector"] if projector.exists() else None,
            task_type="CAUSAL_LM",
        ),
    )
    filled = set()
    for key, tensor in tensors(lora):
        name = re.sub(r"\.(lora_[AB])\.(default\.)?weight$", r".\1.default.weight", transformers_name(key))
        filled.add(_fill(adapted, f"base_model.model.{name}", tensor, f"{lora}: {key}"))
    for key, tensor in (_read(projector) if projector.exists() else {}).items():
        name = transformers_name(key).replace("projector.linear", "projector.modules_to_save.default.linear")
        filled.add(_fill(adapted, f"base_model.model.{name}", tensor, f"{projector}: {key}"))
    missing = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad} - filled
    if missing:
        raise Fault(
            f"{lora} lacks {len(missing)} of the adapter's tensors, the first is {min(missing)}; it must "
            "cover every linear layer of the language model"
        )
    return adapted


def _fill(model: nn.Module, name: str, tensor: Tensor, source: str) -> str:
    """Copy a tensor into the model's of that name; embeddings may have fewer rows, the model's further ones stay."""
    state = model.state_dict(keep_vars=True)
    if name not in state:
        raise Fault(f"{source} has no place in the model (as {name}); is --base a LLaVA-1.5 of llava-hf?")
    target = state[name].data
    rows = len(tensor) if name.endswith(("embed_tokens.weight", "lm_head.weight")) else len(target)
    if tensor.shape != target[:rows].shape:
        raise Fault(
            f"{source} has the shape {tuple(tensor.shape)} and the model {tuple(target.shape)}; choose the "
            "--base of the same size"
        )
    target[:rows] = tensor
    return name


@contextmanager
def _saved(out: Path) -> Iterator[Path]:
    """A folder that is there whole or not at all."""
    if out.exists():
        raise Fault(f"{out} exists; name a new folder with --out")
    draft = out.with_name(f".{out.name}.part")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
        os.replace(draft, out)
    except OSError as error:
        raise Fault(
            f"{out} cannot be written ({error.strerror or error}); free space or choose another --out"
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m povid.adapters", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    merging = commands.add_parser("merge", help="a full checkpoint from adapters")
    merging.add_argument("adapters", type=Path, nargs="+", help="a run folder, or adapter folders in their order")
    merging.add_argument("--base", help="the model underneath; without it the one that the first adapter names")
    converting = commands.add_parser("convert", help="read a checkpoint in original LLaVA's naming")
    converting.add_argument("checkpoint", type=Path)
    converting.add_argument("--lora", type=Path, help="a LoRA on that checkpoint, in original LLaVA's naming")
    converting.add_argument("--base", default="llava-hf/llava-1.5-7b-hf", help="llava-hf's model of the same size")
    for command in (merging, converting):
        command.add_argument("--out", type=Path, required=True)
        command.add_argument("--dtype", choices=sorted(DTYPES), default="float16")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.command == "merge":
            chain = [adapter for place in chosen.adapters for adapter in adapter_chain(place)]
            merge(list(dict.fromkeys(chain)), chosen.out, base=chosen.base, dtype=chosen.dtype)
        else:
            convert(chosen.checkpoint, chosen.out, base=chosen.base, lora=chosen.lora, dtype=chosen.dtype)
    except Fault as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 2
    print(chosen.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
