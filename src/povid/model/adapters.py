"""The adapters that make up a policy: found, checked, merged into a full checkpoint, and converted from the original
LLaVA's names."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from povid.fault import Fault
from povid.files import digest, draft, read_json
from povid.model.loading import Dtype, LocalModel, LoraSettings
from povid.model.policy import add_lora

# From the original LLaVA's names to transformers' (convert_llava_weights_to_hf.py, and llava/model/builder.py for the
# prefixes of adapters). Applying LoRA twice leaves its prefix twice.
RENAMED = (
    (r"^(base_model\.model\.)+", ""),
    (r"^model\.model\.", "model."),
    (r"^model\.mm_projector\.0\.", "model.multi_modal_projector.linear_1."),
    (r"^model\.mm_projector\.2\.", "model.multi_modal_projector.linear_2."),
    (r"^model\.vision_tower\.vision_tower\.(vision_model\.)?", "model.vision_tower."),
    (r"^model\.(layers|embed_tokens|norm)\.", r"model.language_model.\1."),
)

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # values of its --max-lora-rank
SHARD = "5GB"  # of a checkpoint's files: one at a time in memory, and in a broken upload


def adapter_chain(place: Path) -> list[Path]:
    """All adapters, in order, that make up the policy in a run folder, a stage folder or an adapter folder.

    Raises:
        Fault: the folder is none of these, or an adapter is missing or was changed after its stage was finished.
    """
    if place.name == "adapter" and (place.parent / "stage.json").exists():
        place = place.parent
    stages = sorted(place.glob("stage_*/stage.json")) or [place / "stage.json"]
    if stages[-1].exists():
        cure = "restore it from a copy, or name the adapter folders themselves"
        stage = read_json(stages[-1], dict, cure, ("init_from",))
        run = stages[-1].parent.parent
        chain = [_placed(run, entry, stage.get("written_in")) for entry in stage["init_from"]]
        for adapter in chain:
            if (adapter.parent / "stage.json").exists():
                check_adapter(adapter)
        check_adapter(stages[-1].parent / "adapter")
        return [*chain, stages[-1].parent / "adapter"]
    if (place / "adapter_config.json").exists():
        return [place]
    raise Fault(
        f"init_from: {place} contains neither stage_*/stage.json nor adapter_config.json; name an adapter folder or a "
        "run folder with a finished stage"
    )


def _placed(run: Path, entry: str, written_in: str | None) -> Path:
    """The adapter that a stage.json names relative to its run: there or, if the run alone was moved, where it was."""
    for folder in (run, Path(written_in or run)):
        if (adapter := Path(os.path.normpath(folder / entry))).is_dir():
            return adapter
    raise Fault(f"{run} was trained on the adapter {entry}, which is not there; move it back beside the run")


def check_adapter(adapter: Path) -> None:
    """Raise a Fault if an adapter is not the one that its stage saved: its weights or settings were changed."""
    note = adapter.parent / "stage.json"
    cure = "restore it from a copy, or name the adapter folders themselves"
    stage = read_json(note, dict, cure)
    if not {"identity", "adapter_digest"} & {*stage}:  # an earlier version wrote it
        return
    if stage.get("adapter_digest") != adapter_digest(adapter):
        raise Fault(
            f"{adapter} was changed after {note} was written; put back the adapter that the stage saved, or train the "
            "stage again in another folder"
        )


def adapter_digest(adapter: Path) -> str:
    """Sixteen hexadecimal digits that name an adapter: its tensors' files and its settings (r, lora_alpha and so on).

    The base model's path and the order of the layers' names do not count.

    Raises:
        Fault: ``adapter_config.json`` cannot be read.
    """
    file = adapter / "adapter_config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        config.pop("base_model_name_or_path", None)
    except (OSError, ValueError, AttributeError) as error:
        raise Fault(f"{file} cannot be read ({error}); name the folder of an adapter") from None
    config = {key: sorted(map(str, value)) if isinstance(value, list) else value for key, value in config.items()}
    weights = sorted(file for file in adapter.iterdir() if file.suffix in (".safetensors", ".bin"))
    content = [config, [[file.name, digest(file)] for file in weights]]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def transformers_name(key: str) -> str:
    """transformers' name for a tensor of the original LLaVA's checkpoints, without adapter prefixes."""
    for pattern, replacement in RENAMED:
        key = re.sub(pattern, replacement, key)
    return key


def tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every tensor in a checkpoint folder, with one file in memory at a time.

    Raises:
        Fault: there is no weights file, or one cannot be read.
    """
    files = sorted(folder.glob("*.safetensors"))
    files = files or sorted([*folder.glob("pytorch_model*.bin"), *folder.glob("adapter_model.bin")])
    if not files:
        raise Fault(
            f"{folder} contains no weights (*.safetensors, pytorch_model*.bin or adapter_model.bin); name the folder "
            "that was downloaded"
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


def merge(adapters: Sequence[Path], out: Path, *, base: str | None = None, dtype: Dtype = "float16") -> None:
    """Write a full checkpoint (model and processor) of a base model with adapters merged into it, in their order.

    Training at a rate of 1e-7 adds little to the weights: float32 keeps all of it, float16 all but a few per cent, and
    bfloat16 rounds a good part of it away. The policy itself merges in float32 only.

    Args:
        base: folder or hub id; None for the model that the first adapter's adapter_config.json names.
        dtype: of the weights that are written.

    Raises:
        Fault: an adapter or the base model cannot be found, or ``out`` exists or cannot be written.
    """
    config = adapters[0] / "adapter_config.json"
    if base is None:
        if not config.exists():
            raise Fault(f"{adapters[0]} contains no adapter_config.json; name an adapter folder or a finished run")
        base = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise Fault(f"{config} does not say which model it was trained on; name it with --base")
    settings = LocalModel(name=base, path=base, dtype=dtype)
    with new_folder(out) as folder:
        settings.load_model(adapters, merged=True).save_pretrained(folder, max_shard_size=SHARD)
        settings.copy_processor(folder)


def convert(checkpoint: Path, out: Path, *, base: str, lora: Path | None = None, dtype: Dtype = "float16") -> list[str]:
    """Convert the original LLaVA's checkpoint to ``out/model`` and, if given, its LoRA to ``out/adapter``.

    Args:
        checkpoint: folder of full weights (``LlavaLlamaForCausalLM``), with or without the vision tower.
        base: llava-hf's model of the same size. It provides configuration, processor, the embeddings of tokens that
            the original LLaVA does not have, and the vision tower if the checkpoint has none.
        lora: folder with adapter_config.json, adapter_model and, if the projector was trained,
            non_lora_trainables.bin.
        dtype: of the weights that are written.

    Returns:
        The layers outside the language model whose LoRA was left out. Its B is zero there: applying LoRA a second time
        makes new ones for the vision tower too, which the authors' scripts do not train.

    Raises:
        Fault: a tensor is unknown, missing or of another shape, the LoRA changes layers outside the language model, or
            ``out`` exists or cannot be written.
    """
    settings = LocalModel(name=base, path=base, dtype=dtype)
    with new_folder(out) as folder:
        model = settings.load_model()
        filled = set()
        for key, tensor in tensors(checkpoint):
            if not key.endswith(("rotary_emb.inv_freq", "position_ids")):
                filled.add(_fill(model, transformers_name(key), tensor, f"{checkpoint}: {key}"))
        needed = {name for name in model.state_dict() if "vision_tower" not in name}
        if needed - filled:
            raise Fault(
                f"{checkpoint}: {len(needed - filled)} of the model's tensors are missing, the first is "
                f"{min(needed - filled)}; name a folder of full weights and give a LoRA with --lora"
            )
        model.save_pretrained(folder / "model", max_shard_size=SHARD)
        settings.copy_processor(folder / "model")
        dropped: list[str] = []
        if lora is not None:
            adapted, dropped = _convert_lora(model, lora, str(out / "model"))
            adapted.save_pretrained(folder / "adapter")
    return dropped


def _convert_lora(model: Any, lora: Path, base: str) -> tuple[Any, list[str]]:
    """``model``, known as ``base``, with the LoRA of a folder on it, in peft's format, and the layers left out."""
    file, projector = lora / "adapter_config.json", lora / "non_lora_trainables.bin"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        settings = LoraSettings(r=config["r"], alpha=config["lora_alpha"], dropout=config.get("lora_dropout", 0.0))
    except (OSError, ValueError, KeyError) as error:
        raise Fault(f"{file} cannot be read ({error!r}); name the folder of an adapter with --lora") from error
    model.name_or_path = base
    adapted = add_lora(model, settings, "multi_modal_projector" if projector.exists() else None)
    found = {
        re.sub(r"\.(lora_[AB])\.(default\.)?weight$", r".\1.default.weight", transformers_name(key)): (key, tensor)
        for key, tensor in tensors(lora)
    }
    dropped = _without_effect(adapted, {name: tensor for name, (_, tensor) in found.items()})
    filled = set()
    for name, (key, tensor) in found.items():
        if name.rpartition(".lora_")[0] not in dropped:
            filled.add(_fill(adapted, f"base_model.model.{name}", tensor, f"{lora}: {key}"))
    for key, tensor in (_read(projector) if projector.exists() else {}).items():
        name = transformers_name(key).replace("projector.linear", "projector.modules_to_save.default.linear")
        filled.add(_fill(adapted, f"base_model.model.{name}", tensor, f"{projector}: {key}"))
    missing = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad} - filled
    if missing:
        raise Fault(
            f"{lora}: {len(missing)} of the adapter's tensors are missing, the first is {min(missing)}; the adapter "
            "must cover every linear layer of the language model"
        )
    return adapted, sorted(dropped)


def _without_effect(adapted: Any, lora: Mapping[str, Tensor]) -> set[str]:
    """Layers that a LoRA covers and ``adapted`` does not, and where B is zero, so that nothing is lost with them.

    Raises:
        Fault: B is not zero in such a layer.
    """
    covered = {name.removeprefix("base_model.model.") for name in adapted.state_dict()}
    found = {}
    for name, tensor in lora.items():
        layer, _, end = name.rpartition(".lora_")
        if layer and name not in covered and end == "B.default.weight":
            found[layer] = float(tensor.abs().max())
    if trained := {layer: size for layer, size in found.items() if size != 0}:
        layer, size = max(trained.items(), key=lambda item: item[1])
        raise Fault(
            f"the LoRA was trained on {len(trained)} layers outside the language model, such as {layer} (B up to "
            f"{size:.1e}); only a LoRA that leaves these alone can be converted"
        )
    return set(found)


def _fill(model: nn.Module, name: str, tensor: Tensor, source: str) -> str:
    """Copy a tensor into the model's tensor of that name, and return the name.

    Embeddings may have fewer rows than the model's, whose other rows stay.
    """
    state = model.state_dict(keep_vars=True)
    if name not in state:
        raise Fault(f"{source}: the model has no tensor {name}; choose a LLaVA-1.5 of llava-hf as --base")
    target = state[name].data
    rows = len(tensor) if name.endswith(("embed_tokens.weight", "lm_head.weight")) else len(target)
    if tensor.shape != target[:rows].shape:
        raise Fault(
            f"{source} has the shape {tuple(tensor.shape)} and the model's tensor {tuple(target.shape)}; choose a "
            "--base of the same size"
        )
    target[:rows] = tensor
    return name


@contextmanager
def new_place(out: Path) -> Iterator[Path]:
    """A path for a file or folder that becomes ``out`` when the block ends without an exception."""
    if out.exists():
        raise Fault(f"{out} exists; name a new folder with --out")
    try:
        with draft(out) as place:
            yield place
    except OSError as error:
        raise Fault(
            f"{out} cannot be written ({error.strerror or error}); free space or choose another --out"
        ) from error


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into that becomes ``out`` when the block ends without an exception."""
    with new_place(out) as folder:
        folder.mkdir()
        yield folder
