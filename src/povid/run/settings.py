"""Every fault of a configuration at once, before weights load."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from hydra.errors import InstantiationException
from hydra.utils import get_class, get_method, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from povid.benchmarks.suite import BENCHMARKS
from povid.fault import Fault, invalid
from povid.model.policy import ModelSettings
from povid.model.served import ServedModel
from povid.preferences.formats import READERS
from povid.run.checkpoint import CheckpointSettings
from povid.training.datamodule import NoiseSettings
from povid.training.module import ObjectiveSettings, StageSettings


@dataclass(frozen=True, slots=True)
class AblationSettings:
    """A row of Table 3: its stages, in order, and the dispreferences it uses."""

    name: str
    stages: tuple[int, ...]
    dispreferences: tuple[str, ...]
    rows: dict | None = None  # the row's name under another ``dispreference``


@dataclass(frozen=True, slots=True)
class DataSettings:
    """A preference data set: its reader and files, and how it is loaded.

    ``root`` and ``file`` are what ``preferences`` and ``images`` are made of. ``prepare`` is called (Hydra's
    ``_target_``) before the files are read; ``benchmarks`` is the folder of benchmark files that belong to the data,
    if any; ``limit`` uses the first records alone. ``objects`` and ``synonyms`` are read for
    ``dispreference=cooccurrence`` (:func:`povid.dispreference.cooccurrence.instead`).
    """

    name: str
    format: str
    preferences: str
    images: str
    root: str | None = None
    file: str | None = None
    folder: str | None = None
    benchmarks: str | None = None
    split: str | None = None
    pope_suffix: str | None = None
    objects: str | None = None
    synonyms: str | None = None
    prepare: dict | None = None
    workers: int = 0
    cache_mb: int = 0
    group_by_length: bool = True
    limit: int | None = None
    skip_bad: bool = False


@dataclass(frozen=True, slots=True)
class Checked:
    """A configuration that holds: its settings as plain objects."""

    ablation: AblationSettings
    stages: dict[int, StageSettings]
    run_stages: tuple[int, ...]
    model: ModelSettings | ServedModel
    data: DataSettings
    noise: NoiseSettings
    objective: ObjectiveSettings
    checkpoint: CheckpointSettings
    trainer: dict[str, Any]
    dispreference: str = "given"  # of the text dispreferences that are used; "given" where none is

    @property
    def split(self) -> bool:
        """Whether the trainer splits the weights, over devices or between device and machine."""
        return _splits(self.trainer)


def _splits(trainer: Any) -> bool:
    strategy = (trainer or {}).get("strategy")
    return isinstance(strategy, dict) and strategy.get("_target_") == "povid.training.sharding.FSDP2"


def check(cfg: DictConfig) -> Checked:
    """Bind a composed configuration to what it instantiates.

    Raises:
        Fault: one message with every fault found, one line each: the key, what was found, what to do.
    """
    faults: list[str] = []
    try:
        tree = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        said = str(error).splitlines()[0]
        raise Fault(f"configuration: {said}; give {error.full_key or 'that key'} a value") from None

    ablation = _bind(AblationSettings, tree.get("ablation"), "ablation", faults)
    node = tree.get("model")
    if isinstance(node, dict) and "_target_" in node:
        model = _built(node, "model", faults)
    else:
        model = _bind(ModelSettings, node, "model", faults)
    data = _bind(DataSettings, tree.get("data"), "data", faults)
    noise = _bind(NoiseSettings, tree.get("noise"), "noise", faults)
    objective = _bind(ObjectiveSettings, tree.get("objective"), "objective", faults)
    checkpoint = _bind(CheckpointSettings, tree.get("checkpoint"), "checkpoint", faults)
    # trainer.batch_size speaks for every stage; it is ours and not lightning.Trainer's.
    size = (tree.get("trainer") or {}).pop("batch_size", None)
    for node in (tree.get("stages") or {}).values() if size is not None else ():
        node["batch_size"] = size
    stages = {}
    for key, node in (tree.get("stages") or {}).items():
        if str(key) not in ("1", "2"):
            faults.append(f"stages.{key}: there is no such stage; the stages are 1 and 2")
        else:
            stages[int(key)] = _bind(StageSettings, node, f"stages.{key}", faults)
    run_stages = _stages(tree, ablation, faults)
    for key in ("trainer",):
        _check_target(tree.get(key) or {}, key, faults)
    if isinstance(model, ModelSettings) and model.prepare:
        _check_target(model.prepare, "model.prepare", faults)
    if data and data.prepare:
        _check_target(data.prepare, "data.prepare", faults)
    faults += _values(tree, ablation, stages, model, data, noise, objective)
    if checkpoint and (checkpoint.keep < 1 or (checkpoint.every_steps or 1) < 1 or (checkpoint.every_minutes or 0) < 0):
        faults.append(
            f"checkpoint: found {tree['checkpoint']}; keep and every_steps must be at least 1 and "
            "every_minutes at least 0"
        )
    if tree.get("resume") not in (True, False):
        faults.append(
            f"resume: found {tree.get('resume')!r}; it is true (with hydra.run.dir=), false or, on the "
            "command line of train.py, latest"
        )
    if faults:
        count = "a fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise Fault(f"the configuration has {count}:\n" + "\n".join(f"  - {fault}" for fault in faults))
    used = tree["dispreference"] if "text" in ablation.dispreferences else "given"
    return Checked(ablation, stages, run_stages, model, data, noise, objective, checkpoint, tree["trainer"], used)


def _built(node: dict, key: str, faults: list[str]) -> Any:
    """What a ``_target_`` node instantiates, or None with a fault for each setting that is invalid."""
    try:
        return instantiate(node, _convert_="all")
    except InstantiationException as error:
        if isinstance(error.__cause__, ValidationError):
            faults += invalid(error.__cause__, get_class(node["_target_"]), key)
        else:
            faults.append(f"{key}: {str(error).splitlines()[0]}")
        return None


def _bind(kind: type, node: Any, key: str, faults: list[str]) -> Any:
    """``kind(**node)``, or None with the faults of every key noted."""
    if not isinstance(node, dict):
        faults.append(
            f"{key}: found {node!r}, needed the keys {', '.join(f.name for f in fields(kind))}; choose a "
            f"file of conf/{key.partition('.')[0]}"
        )
        return None
    before, hints, values = len(faults), get_type_hints(kind), {}
    for name, value in node.items():
        if name not in hints:
            faults.append(f"{key}.{name}: there is no such setting{_near(name, hints)}")
        elif is_dataclass(hints[name]):
            values[name] = _bind(hints[name], value, f"{key}.{name}", faults)
        else:
            fitting = _fit(value, hints[name])
            if fitting is None and value is not None:
                faults.append(f"{key}.{name}: found {value!r}, needed {_spoken(hints[name])}")
            elif value is None and type(None) not in get_args(hints[name]):
                faults.append(f"{key}.{name}: found nothing, needed {_spoken(hints[name])}")
            values[name] = fitting
    needed = [p.name for p in inspect.signature(kind).parameters.values() if p.default is inspect.Parameter.empty]
    for name in needed:
        if name not in node:
            faults.append(f"{key}.{name}: missing; it must be {_spoken(hints[name])}")
    return kind(**values) if len(faults) == before else None


def _fit(value: Any, hint: Any) -> Any:
    """The value as the hinted type, or None where it does not fit."""
    if get_origin(hint) in (Union, UnionType):
        return next((fit for fit in (_fit(value, option) for option in get_args(hint)) if fit is not None), None)
    if get_origin(hint) is tuple:
        inner = get_args(hint)[0]
        fitted = [_fit(entry, inner) for entry in value] if isinstance(value, list) else [None]
        return None if any(entry is None for entry in fitted) else tuple(fitted)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, bool):
        return None
    return value if isinstance(hint, type) and isinstance(value, hint) else None


def _spoken(hint: Any) -> str:
    names = {
        int: "a whole number",
        float: "a number",
        str: "text",
        bool: "true or false",
        dict: "a mapping",
        type(None): "null",
    }
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_spoken(option) for option in get_args(hint))
    if get_origin(hint) is tuple:
        return f"a list of {_spoken(get_args(hint)[0]).removeprefix('a ')}s"
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def _near(name: str, known: Any) -> str:
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; the settings are {', '.join(known)}"


def _check_target(node: dict, key: str, faults: list[str]) -> None:
    """The keys of a ``_target_`` node against the signature of what it calls."""
    target = node.get("_target_")
    try:
        call: Callable = get_method(target) if target else None
    except Exception:
        call = None
    if call is None:
        faults.append(f"{key}._target_: {target!r} cannot be imported; name a function or class")
        return
    parameters = inspect.signature(call).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    for name in node:
        if name not in parameters and name not in ("_target_", "_partial_", "_convert_", "_recursive_"):
            faults.append(f"{key}.{name}: {target} takes no such argument{_near(name, parameters)}")


def _stages(tree: dict, ablation: AblationSettings | None, faults: list[str]) -> tuple[int, ...]:
    """The stages that this run trains."""
    stage = tree.get("stage")
    if stage not in (1, 2, "all"):
        faults.append(f"stage: found {stage!r}; it is 1, 2 or all")
        return ()
    if ablation is None or stage == "all":
        return ablation.stages if ablation else ()
    if stage not in ablation.stages:
        has = " and ".join(map(str, ablation.stages)) or "none: it is the base model"
        other = {1: "text or ablation=both", 2: "noise or ablation=both"}[stage]
        faults.append(f"stage: ablation {ablation.name!r} has no stage {stage} (it has {has}); use ablation={other}")
        return ()
    return (stage,)


def _values(tree: dict, ablation, stages, model, data, noise, objective) -> Iterator[str]:
    """Faults of single values."""
    strategy = (tree.get("trainer") or {}).get("strategy")
    if (
        isinstance(strategy, dict)
        and str(strategy.get("_target_")).endswith("DeepSpeedStrategy")
        and strategy.get("stage") not in (None, 1, 2)
    ):
        yield (
            f"trainer.strategy.stage: found {strategy['stage']}; ZeRO 1 and 2 leave every device its weights, 3 "
            "would save adapters in pieces: use trainer=fsdp2 to split weights"
        )
    if tree.get("reference_cache") not in (None, True, False):
        yield f"reference_cache: found {tree['reference_cache']!r}; it is true, false or null"
    seed = tree.get("seed")
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**31:
        yield f"seed: found {seed!r}, needed a whole number from 0 to {2**31 - 1}"
    if ablation:
        for name in set(ablation.dispreferences) - {"text", "noise"}:
            yield f"ablation.dispreferences: there is no dispreference {name!r}; use text and noise"
        for number in ablation.stages:
            if number not in stages:
                yield f"ablation.stages: there is no stage {number}; the stages are 1 and 2"
    for number, stage in stages.items():
        if stage is None:
            continue
        automatic = stage.batch_size == "auto"
        if isinstance(stage.batch_size, str) and not automatic:
            yield f"stages.{number}.batch_size: found {stage.batch_size!r}, needed a whole number or auto"
            continue
        if automatic and (tree.get("trainer") or {}).get("devices") != 1:
            yield f"stages.{number}.batch_size: auto is decided on one device; use trainer.devices=1 or give a number"
        elif automatic and _splits(tree.get("trainer")):
            yield (
                f"stages.{number}.batch_size: auto is measured with the whole model on the device, and this trainer "
                "splits it; give a number"
            )
        for name, low in (("accumulate", 1),) if automatic else (("batch_size", 1), ("accumulate", 1)):
            if getattr(stage, name) < low:
                yield f"stages.{number}.{name}: found {getattr(stage, name)}, needed at least {low}"
        if stage.lr <= 0:
            yield f"stages.{number}.lr: found {stage.lr}, needed more than 0"
        if stage.epochs < 1 and stage.max_steps < 1:
            yield f"stages.{number}: epochs is {stage.epochs} and max_steps {stage.max_steps}; one must be at least 1"
    if noise:
        if noise.schedule not in ("sigmoid", "linear", "cosine"):
            yield f"noise.schedule: found {noise.schedule!r}; it is sigmoid, linear or cosine"
        if not 0 <= noise.step <= 999:
            yield f"noise.step: found {noise.step}, needed 0 to 999"
        if noise.space not in ("normalized", "pixel"):
            yield f"noise.space: found {noise.space!r}; it is normalized or pixel"
        if noise.wrap_around and (noise.space != "pixel" or (objective and objective.name != "released")):
            yield (
                "noise.wrap_around: 8-bit wrap-around is a fault of the released code's pixel noise; it needs "
                "noise.space=pixel and objective=released"
            )
    if objective and objective.name not in ("paper", "released", "preferred_only"):
        yield f"objective.name: found {objective.name!r}; it is paper, released or preferred_only"
    if isinstance(model, ServedModel):
        if ablation and ablation.stages:
            yield (
                f"ablation: {ablation.name!r} trains and a served model can only be evaluated; use ablation=none or "
                "another model"
            )
        if tree.get("adapters") or tree.get("init_from"):
            yield "adapters: a served model takes none; merge them, serve the result and name that"
    elif model:
        if model.style not in ("vicuna_v1", "chat", "bare"):
            yield f"model.style: found {model.style!r}; it is vicuna_v1, chat or bare"
        if model.quantize not in (None, "4bit"):
            yield f"model.quantize: found {model.quantize!r}; it is 4bit or null"
        if model.dtype not in ("float32", "bfloat16", "float16", "float64"):
            yield f"model.dtype: found {model.dtype!r}; it is float32, bfloat16 or float16"
        if model.path.startswith("package:") and not Path(model.source).exists():
            yield f"model.path: the package holds no {model.path.removeprefix('package:')!r}"
    if data and data.format not in READERS:
        yield f"data.format: found {data.format!r}; it is one of {', '.join(READERS)}"
    if (kind := tree.get("dispreference")) not in ("given", "cooccurrence"):
        yield (
            f"dispreference: found {kind!r}; it is given or cooccurrence (what an endpoint answers is written to a "
            "file first, by python -m povid.dispreference)"
        )
    elif data and kind == "cooccurrence" and ablation and "text" in ablation.dispreferences:
        if data.objects is None and data.format != "povid":
            yield (
                "data.objects: dispreference=cooccurrence needs to know which objects are in the pictures; give "
                "data.objects=FILE: COCO's instances JSON or {picture: [objects]}"
            )
        for key in ("objects", "synonyms"):
            file = getattr(data, key)
            if file is not None and data.prepare is None and not Path(file).is_file():
                yield f"data.{key}: {file} does not exist; name the file"
    for name in tree.get("benchmarks") or {}:
        if name not in BENCHMARKS:
            yield f"benchmarks.{name}: there is no such benchmark{_near(name, BENCHMARKS)}"
    init = tree.get("init_from")
    if init is not None and not Path(init).exists():
        yield f"init_from: {init} does not exist; name a run folder or an adapter folder"
    for folder in tree.get("adapters") or ():
        if not (Path(folder) / "adapter_config.json").is_file():
            yield f"adapters: {folder} holds no adapter_config.json; name folders that hold an adapter"
