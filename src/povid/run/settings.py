"""The settings of a run, built and checked as a whole before any weights load.

:func:`build` is the only reader of the composed configuration. Types and bounds are declared on the fields of what is
built; the rules between fields are here.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    StrategyRegistry,
)
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from povid.benchmarks import suite
from povid.benchmarks.benchmark import Benchmark
from povid.fault import Fault, did_you_mean, holds_login
from povid.method.distortions import Distortion
from povid.method.objectives import ON_DISTORTED, Objective
from povid.preferences.fetch import DataSource
from povid.run import build as building
from povid.run.build import is_node
from povid.run.checkpoint import CheckpointSettings
from povid.run.watch import PREFIX as VALIDATION
from povid.run.watch import Better, Watcher
from povid.training.metrics import directions
from povid.training.module import StageSettings
from povid.training.sharding import FSDP2

STAGES = ("1", "2")
SET_BY_THE_RUN = {  # arguments of the trainer, and the settings that replace them
    "max_epochs": "stages.N.epochs",
    "max_steps": "stages.N.max_steps",
    "accumulate_grad_batches": "stages.N.accumulate",
    "gradient_clip_val": "stages.N.max_grad_norm",
    "logger": "the group logger, for example logger=[wandb,tensorboard]",
    "callbacks": "the group callbacks, or +callbacks.NAME={_target_: ...}",
    "default_root_dir": "hydra.run.dir",
    "enable_checkpointing": "checkpoint.every_steps and checkpoint.every_minutes",
    "min_epochs": "stages.N.epochs",
    "min_steps": "stages.N.max_steps",
    "max_time": "stages.N.max_steps",
    "fast_dev_run": "data.limit and stages.N.max_steps",
    "overfit_batches": "data.limit",
    "barebones": "logger=none",
    "num_sanity_val_steps": "data.validation, whose metrics begin with the first steps",
}
PER_STAGE = ("params", "lr", "weight_decay")  # of parameter groups, which each stage makes
COUNTED = ("optimizer", "num_warmup_steps", "num_training_steps")


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


Name = Annotated[str, Field(pattern=r"^[^\s./][^/\n]*$")]
"""What stands in tables and in the names of folders."""


class TrainerBounds(BaseModel):
    """Bounds of arguments that lightning.Trainer takes without them, and of those with which it would train nothing."""

    model_config = ConfigDict(extra="allow", strict=True)

    accelerator: str | Any = "auto"
    devices: Annotated[int, Field(ge=-1)] | Annotated[list[int], Field(min_length=1)] | str = "auto"
    num_nodes: Annotated[int, Field(ge=1)] = 1
    log_every_n_steps: Annotated[int, Field(ge=1)] | None = None
    limit_train_batches: Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, le=1)] | None = None
    reload_dataloaders_every_n_epochs: Literal[1] = 1
    use_distributed_sampler: Literal[False] = False
    val_check_interval: Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, le=1)] | None = None
    check_val_every_n_epoch: Annotated[int, Field(ge=1)] | None = None
    limit_val_batches: Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, le=1)] | None = None
    gradient_clip_algorithm: Literal["norm", "value"] | None = None

    @field_validator("devices")
    @classmethod
    def _some(cls, devices: Any) -> Any:
        if devices == 0 or (isinstance(devices, str) and not re.fullmatch(r"auto|-1|[0-9]+(,[0-9]+)*", devices)):
            raise ValueError(f"found {devices!r}, needed a number of devices, -1 for all of them, or auto")
        return devices

    @field_validator("accelerator")
    @classmethod
    def _known_accelerator(cls, name: Any) -> Any:
        from lightning.pytorch.accelerators import AcceleratorRegistry

        known = ["auto", "gpu", *AcceleratorRegistry.available_accelerators()]
        if isinstance(name, str) and name not in known:
            raise ValueError(f"there is no accelerator {name!r}{did_you_mean(name, known, 'accelerators')}")
        return name

    @field_validator("strategy", check_fields=False)
    @classmethod
    def _known_strategy(cls, name: Any) -> Any:
        known = ["auto", *StrategyRegistry.available_strategies()]
        if isinstance(name, str) and name not in known:
            raise ValueError(f"there is no strategy {name!r}{did_you_mean(name, known, 'strategies')}")
        return name

    strategy: str | Any = "auto"


class Ablation(_Settings):
    """A row of Table 3: its stages, in order, and the dispreferences it uses.

    ``rows``: the row's name under another ``dispreference``.
    """

    name: Name
    stages: list[Literal[1, 2]]
    dispreferences: list[Literal["text", "noise"]]
    rows: dict[str, str] | None = None

    @model_validator(mode="after")
    def _is_a_row(self) -> Ablation:
        if self.stages != sorted(set(self.stages)):
            raise ValueError(f"stages: found {self.stages}, needed each stage once and in order")
        if bool(self.stages) != bool(self.dispreferences):
            raise ValueError(
                f"stages are {self.stages} and dispreferences {self.dispreferences}; stages train on dispreferences, "
                "and without stages there are none"
            )
        return self


class DataSettings(_Settings):
    """A preference data set: its format and files, and how it is loaded.

    ``source`` says where ``python -m povid.preferences fetch`` gets it.
    ``format`` is a node that reads records; ``preferences`` and ``images`` are derived from ``root`` and ``file``.
    ``prepare`` is a node that is built before the files are read; ``benchmarks`` is the folder of benchmark files that
    belong to the data, if any; ``limit`` uses the first records alone, ``skip_bad`` skips and counts records that
    cannot be used. ``objects`` and ``synonyms`` describe the pictures for ``dispreference=cooccurrence``.
    ``validation`` holds out a share of the pictures, or names a file of held-out records in the same format; ``probe``
    is the folder of benchmark files that ``callbacks=[probe]`` asks about while a stage trains.
    """

    name: str
    source: DataSource | None = None
    format: dict[str, Any]
    preferences: str
    images: str
    root: str | None = None
    file: str | None = None
    folder: str | None = None
    benchmarks: str | None = None
    split: Literal["evaluation", "tuning"] | None = None
    pope_suffix: str | None = None
    objects: str | None = None
    synonyms: str | None = None
    prepare: dict[str, Any] | None = None
    workers: Annotated[int, Field(ge=0)] = 0
    cache_mb: Annotated[int, Field(ge=0)] = 0
    group_by_length: bool = True
    limit: Annotated[int, Field(ge=1)] | None = None
    skip_bad: bool = False
    validation: float | str | None = None
    probe: str | None = None

    @field_validator("validation")
    @classmethod
    def _share_or_file(cls, value: float | str | None) -> float | str | None:
        if value == "" or (isinstance(value, float) and not 0 < value < 1):
            found = repr(value) if isinstance(value, str) else f"{value:g}"
            raise ValueError(f"found {found}, needed a share above 0 and below 1, a file, or null")
        return value


class Generation(_Settings):
    """``batch_size``: questions answered together."""

    batch_size: Annotated[int, Field(ge=1)] = 64


class Quick(_Settings):
    """``limit``: ask every benchmark about the first so many pictures alone; null for all of them."""

    limit: Annotated[int, Field(ge=1)] | None = None


class Plain(_Settings):
    """The settings that belong to no group."""

    stage: Literal[1, 2, "all"]
    seed: Annotated[int, Field(ge=0, lt=2**31)]
    row: Name
    outputs: Annotated[str, Field(min_length=1)]
    init_from: str | None
    adapters: list[str]
    reference_cache: bool | None
    resume: bool
    samples: Annotated[int, Field(ge=0)]
    samples_every: Annotated[int, Field(ge=1)] | None
    optimized_metric: Annotated[str, Field(min_length=1)] | Annotated[list[str], Field(min_length=1)] | None = None


@dataclass(frozen=True)
class Settings:
    """All settings of a run, checked and, where that is cheap, built.

    ``objectives`` and ``terms`` are by stage, for the stages of the ablation. ``trainer``, ``callbacks``, ``loggers``,
    ``judge`` and ``prepare`` are checked nodes that are built when they are needed
    (:func:`povid.run.build.make`). ``engine`` answers the benchmarks in place of the model's own generation, if it is
    not None. ``tree`` is the configuration as it is written to config.yaml and hashed.
    """

    plain: Plain
    ablation: Ablation
    stages: dict[int, StageSettings]
    run_stages: tuple[int, ...]
    objective: str
    objectives: dict[int, Objective]
    terms: dict[int, frozenset[str]]
    distortion: Distortion
    model: Any
    data: DataSettings
    dispreference: Any
    benchmarks: dict[str, Benchmark]
    judge: dict[str, Any] | None
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    trainer: dict[str, Any]
    callbacks: dict[str, dict[str, Any]]
    loggers: dict[str, dict[str, Any]]
    checkpoint: CheckpointSettings
    generation: Generation
    engine: Any
    experiment: str | None
    tree: dict[str, Any]

    @property
    def several(self) -> bool:
        """Whether the run is one of several processes, or needs a process group for split weights."""
        single = self.trainer.get("devices") == 1 and self.trainer.get("num_nodes") in (None, 1)
        works = self.run_stages or self.benchmarks or self.plain.samples
        return bool(self.model.trainable and works and (self.split or not single))

    @property
    def split(self) -> bool:
        """Whether the trainer splits the weights, over devices or between device and machine."""
        return splits(self.trainer)

    def dispreferences(self, stage: int) -> frozenset[str]:
        """Those that a stage uses under this ablation, of "text" and "noise"."""
        return frozenset(self.stages[stage].dispreferences) & frozenset(self.ablation.dispreferences)

    @property
    def dispreference_name(self) -> str:
        """Where the text dispreferences that are used come from; "given" where none is used."""
        return self.tree["dispreference"]["name"] if "text" in self.ablation.dispreferences else "given"

    def validated(self, stage: int) -> dict[str, Better]:
        """The metrics of a stage's validation of which one direction is better, and that direction."""
        found = directions(self.objectives[stage], self.terms[stage])
        return {f"{VALIDATION}{name}": better for name, better in found.items()}

    def watchers(self) -> list[Watcher]:
        """Those of the callbacks that only measure, newly built."""
        return [building.make(node) for node in self.callbacks.values() if is_watcher(node)]

    def objective_node(self, stage: int) -> dict[str, Any]:
        return _objective_nodes(self.tree["objective"])[str(stage)]


def is_watcher(node: Mapping[str, Any]) -> bool:
    """Whether a callback's node makes a :class:`povid.run.watch.Watcher`, which changes no number by itself."""
    kind = building.target(node, "callbacks", [])
    return isinstance(kind, type) and issubclass(kind, Watcher)


def splits(trainer: Mapping[str, Any]) -> bool:
    """Whether a trainer node's strategy splits the weights (FSDP2)."""
    return issubclass(_strategy(trainer)[0], FSDP2)


def _strategy(trainer: Mapping[str, Any]) -> tuple[type, Mapping[str, Any]]:
    """The class of a trainer's strategy and its arguments; it is a node or a name of Lightning's registry.

    ``object`` for one that is not known yet ("auto"), or that has problems of its own.
    """
    strategy = trainer.get("strategy")
    if is_node(strategy):
        kind = building.target(strategy, "trainer.strategy", [])
        return (kind, strategy) if isinstance(kind, type) else (object, {})
    if not (isinstance(strategy, str) and strategy in StrategyRegistry):
        return object, {}
    known = StrategyRegistry[strategy]
    return known["strategy"], known["init_params"]


def build(cfg: DictConfig) -> Settings:
    """The settings of a composed configuration.

    Raises:
        Fault: one message with every problem found, one line each: the key, what was found, what to do.
    """
    try:
        tree: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise Fault(f"configuration: {reason}; give {error.full_key or 'that key'} a value") from None
    _locate(tree.get("data"))
    problems: list[str] = [
        f"{key}: the address holds a user name or password, which would stand in config.yaml; leave it out and give it "
        "in the environment variables that the package reads"
        for key, value in _leaves(tree)
        if isinstance(value, str) and holds_login(value)
    ]
    problems += _unknown_options()
    plain = building.settings(Plain, {k: tree[k] for k in Plain.model_fields if k in tree}, "", problems)
    ablation = building.settings(Ablation, tree.get("ablation"), "ablation", problems)
    data = building.settings(DataSettings, tree.get("data"), "data", problems)
    checkpoint = building.settings(CheckpointSettings, tree.get("checkpoint"), "checkpoint", problems)
    generation, engine = _generation(tree.get("generation"), problems)
    model = _node(tree, "model", problems)
    distortion = _made_kind(_node(tree, "noise", problems), tree.get("noise"), "noise", Distortion, problems)
    dispreference = _node(tree, "dispreference", problems)
    if dispreference is not None and not callable(
        dispreference
    ):  # a generator, configured with the keys of its own command
        problems.append(
            f"dispreference: {tree['dispreference'].get('name')!r} writes its responses to a file first, by python -m "
            "povid.dispreference; train on that file with data=povid_17k data.root=FOLDER data.file=FILE"
        )
    else:
        problems += [f"{key}: there is no such setting{did_you_mean(key, KEYS)}" for key in tree if key not in KEYS]
    trainer = dict(tree.get("trainer") or {})
    size = trainer.pop("batch_size", None)  # of every stage; not an argument of lightning.Trainer
    stages = _stages(tree, size, problems)
    objectives = _objectives(tree, problems)
    benchmarks = _benchmarks(tree.get("benchmarks") or {}, problems)
    if data:
        for name in ("format", "prepare"):
            if getattr(data, name) is not None:
                _checked(getattr(data, name), f"data.{name}", problems)
        _check_reader(data.format, problems)
    if getattr(model, "prepare", None):
        _checked(model.prepare, "model.prepare", problems)
    judge = tree.get("judge") or None
    if judge is not None:
        _checked(judge, "judge", problems)
    _check_trainer(trainer, problems)
    _check_optimisation(tree, problems)
    nodes = {group: dict(tree.get(group) or {}) for group in ("callbacks", "logger")}
    for group, members in nodes.items():
        for name, node in members.items():
            _checked(node, f"{group}.{name}", problems, *(TO_LOGGERS if group == "logger" else ()))
            _check_kind(node, f"{group}.{name}", {"callbacks": Callback, "logger": Logger}[group], problems)
    run_stages = _run_stages(plain, ablation, problems)
    watchers = _watchers(nodes["callbacks"], trainer, problems)
    terms: dict[int, frozenset[str]] = {}
    if ablation:
        for number in ablation.stages:
            objective, stage = objectives.get(number), stages.get(number)
            if objective is not None and stage is not None:
                try:
                    terms[number] = objective.terms({*stage.dispreferences} & {*ablation.dispreferences})
                except ValueError as error:
                    problems.append(f"objective: {error} (stage {number} of ablation={ablation.name})")
    if plain and data and checkpoint:
        validated = data.validation is not None
        for trained in run_stages:
            known = dict(_metrics(watchers))
            if validated and trained in terms:
                found = directions(objectives[trained], terms[trained])
                known |= {f"{VALIDATION}{name}": better for name, better in found.items()}
            problems += _best_problems(checkpoint, known, trained)
        problems += _optimized_problems(plain, benchmarks, watchers, validated, run_stages)
    problems += _rules(plain, ablation, stages, model, distortion, trainer, terms)
    if engine is not None and model is not None and (unsuited := engine.unsuited(model)):
        problems.append(f"generation.engine: {unsuited}")
    if problems:
        count = "a problem" if len(problems) == 1 else f"{len(problems)} problems"
        lines = "\n".join(f"  - {problem.removeprefix('.')}" for problem in problems)
        raise Fault(f"the configuration has {count}:\n{lines}")
    return Settings(
        plain=plain,
        ablation=ablation,
        stages=stages,
        run_stages=run_stages,
        objective=_objective_name(tree["objective"]),
        objectives={number: objectives[number] for number in ablation.stages},
        terms=terms,
        distortion=distortion,
        model=model,
        data=data,
        dispreference=dispreference,
        benchmarks=benchmarks,
        judge=judge,
        optimizer=tree["optimizer"],
        schedule=tree["schedule"],
        trainer=trainer,
        callbacks=nodes["callbacks"],
        loggers=nodes["logger"],
        checkpoint=checkpoint,
        generation=generation,
        engine=engine,
        experiment=HydraConfig.get().runtime.choices.get("experiment") if HydraConfig.initialized() else None,
        tree=tree,
    )


def _locate(data: Any) -> None:
    """Let ``preferences`` be the file that ``root`` and ``file`` mean.

    An absolute ``file`` is meant as it is. A relative one is below ``root`` or, where ``root`` has no such file, below
    the folder that the command was started in, as other paths on a command line are.
    """
    if not isinstance(data, dict):
        return
    root, file = data.get("root"), data.get("file")
    if not (isinstance(root, str) and isinstance(file, str)) or data.get("preferences") != f"{root}/{file}":
        return
    below = Path(root) / file  # the file alone, if it is absolute
    data["preferences"] = str(below if below.exists() or not Path(file).exists() else Path(file))


def _unknown_options() -> Iterator[str]:
    """A file that was chosen for an optional group and does not exist, over which Hydra passes."""
    if not (HydraConfig.initialized() and GlobalHydra.instance().is_initialized()):
        return
    loader = GlobalHydra.instance().config_loader()
    for override in HydraConfig.get().overrides.task:
        group, _, name = override.lstrip("+").partition("=")
        group = group.partition("@")[0]
        known = loader.get_group_options(group) if re.fullmatch(r"[\w/]+", group) else []
        added = (
            Path(source.path) / group for source in HydraConfig.get().runtime.config_sources if source.schema == "file"
        )
        known += [file.stem for folder in added for file in folder.glob("*.yaml") if file.stem not in known]
        if known and re.fullmatch(r"[\w-]+", name) and name not in (*known, "null"):
            yield f"{group}: there is no {name!r}{did_you_mean(name, known, 'choices')}"


def check_devices(settings: Settings) -> None:
    """Make the trainer of a run that trains or has several processes, before anything else is made.

    Raises:
        Fault: this machine does not have what it asks for, or its arguments do not go together.
    """
    if not (settings.run_stages or settings.several):
        return
    try:
        trainer = building.make(settings.trainer, max_epochs=1, logger=False, enable_checkpointing=False)
    except Exception as error:  # whatever Lightning and its strategies raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise Fault(f"trainer: {reason}; choose another trainer= or correct its arguments") from None
    cores = os.cpu_count() or 1
    if isinstance(trainer.accelerator, CPUAccelerator) and trainer.num_devices > max(cores, 2):  # two: to try DDP
        raise Fault(
            f"trainer.devices: {trainer.num_devices} processes would share the {cores} cores of this machine; give no "
            "more than that, or an accelerator"
        )


GROUPS = (
    "ablation", "benchmarks", "callbacks", "checkpoint", "data", "dispreference", "generation", "judge", "logger",
    "model", "noise", "objective", "optimizer", "schedule", "stages", "trainer",
)  # fmt: skip
KEYS = (*Plain.model_fields, *GROUPS, "launcher")
TO_LOGGERS = (("run",), ("save_dir",))  # what the run gives them, and what it offers


def _node(tree: Mapping[str, Any], name: str, problems: list[str], prefix: str = "") -> Any:
    """The node ``name`` built; None after a problem."""
    node = tree.get(name)
    if not is_node(node):
        group = prefix.rstrip(".") or name
        problems.append(f"{prefix}{name}: found {node!r}, needed a _target_; choose a file of conf/{group}")
        return None
    return building.build(node, f"{prefix}{name}", problems)


def _checked(
    node: Any, key: str, problems: list[str], given: tuple[str, ...] = (), offered: tuple[str, ...] = ()
) -> None:
    if not is_node(node):
        problems.append(f"{key}: found {node!r}, needed a mapping with a _target_")
    else:
        building.check(node, key, problems, given, offered)


def _stages(tree: Mapping[str, Any], size: Any, problems: list[str]) -> dict[int, StageSettings | None]:
    stages = {}
    for key, node in (tree.get("stages") or {}).items():
        if str(key) not in STAGES:
            problems.append(f"stages.{key}: there is no such stage; the stages are {' and '.join(STAGES)}")
            continue
        if size is not None and isinstance(node, dict):
            node["batch_size"] = size
        stages[int(key)] = building.settings(StageSettings, node, f"stages.{key}", problems)
    return stages


def _generation(node: Any, problems: list[str]) -> tuple[Generation | None, Any]:
    """The settings of generation and, unless it is null, the engine that answers."""
    if not isinstance(node, Mapping):
        return building.settings(Generation, node, "generation", problems), None
    plain = building.settings(Generation, {k: v for k, v in node.items() if k != "engine"}, "generation", problems)
    engine = node.get("engine")
    if engine is None or is_node(engine):
        return plain, engine and building.build(engine, "generation.engine", problems)
    problems.append(
        f"generation.engine: found {engine!r}, needed a _target_; choose a file of conf/generation.engine, or null"
    )
    return plain, None


def _benchmarks(group: Mapping[str, Any], problems: list[str]) -> dict[str, Benchmark]:
    """The benchmarks of a run, each with the limit that the group sets for all of them."""
    quick = building.settings(
        Quick, {k: v for k, v in group.items() if k in Quick.model_fields}, "benchmarks", problems
    )
    names = [name for name in group if name not in Quick.model_fields]
    built = {name: _node(group, name, problems, "benchmarks.") for name in names}
    if quick is None or quick.limit is None:
        return built
    return {name: one.changed(limit=one.limit or quick.limit) for name, one in built.items() if one is not None}


def _objective_nodes(node: Any) -> dict[str, dict[str, Any]]:
    """The objective of each stage: one for all, or one under each stage's number."""
    if is_node(node):
        return {key: {k: v for k, v in node.items() if k != "name"} for key in STAGES}
    return {str(k): v for k, v in (node or {}).items() if str(k) in STAGES and is_node(v)}


def _objective_name(node: Mapping[str, Any]) -> str:
    return node.get("name") or node["_target_"].rpartition(".")[2]


def _objectives(tree: Mapping[str, Any], problems: list[str]) -> dict[int, Objective]:
    node = tree.get("objective")
    nodes = _objective_nodes(node)
    if not nodes:
        problems.append(f"objective: found {node!r}, needed a _target_, or one under each of 1 and 2")
        return {}
    if not is_node(node):
        problems += [
            f"objective.{key}: found {node[key]!r}, needed a _target_"
            for key in node
            if str(key) in STAGES and not is_node(node[key])
        ]
        problems += [
            f"objective.{key}: there is no such setting; the settings are name, 1 and 2"
            for key in node
            if str(key) not in ("name", *STAGES)
        ]
        if "name" not in node:
            problems.append("objective.name: missing; name it for results and tables")
        return {
            int(n): _made_kind(
                building.build(each, f"objective.{n}", problems), each, f"objective.{n}", Objective, problems
            )
            for n, each in nodes.items()
        }
    one = _made_kind(building.build(nodes["1"], "objective", problems), node, "objective", Objective, problems)
    return dict.fromkeys(map(int, nodes), one)


def _check_trainer(trainer: dict[str, Any], problems: list[str]) -> None:
    for name, instead in SET_BY_THE_RUN.items():
        if name in trainer:
            problems.append(f"trainer.{name}: the run sets this itself; use {instead}")
    taken = {k: v for k, v in trainer.items() if k not in SET_BY_THE_RUN}
    before = len(problems)
    _checked(taken or None, "trainer", problems)
    if len(problems) == before:
        building.settings(TrainerBounds, taken, "trainer", problems)


def _check_optimisation(tree: Mapping[str, Any], problems: list[str]) -> None:
    """Hold optimiser and schedule against their signatures, and make both for one weight, as a stage will."""
    before = len(problems)
    _checked(tree.get("optimizer"), "optimizer", problems, given=PER_STAGE)
    _checked(tree.get("schedule"), "schedule", problems, given=COUNTED)
    if len(problems) > before:
        return
    key = "optimizer"
    try:
        weight = torch.nn.Parameter(torch.zeros(1))
        optimizer = building.make(tree["optimizer"])([{"params": [weight], "lr": 1e-3, "weight_decay": 0.0}])
        key = "schedule"
        building.make(tree["schedule"])(optimizer=optimizer, num_warmup_steps=1, num_training_steps=2)
    except Exception as error:  # whatever somebody's optimiser makes of its arguments
        problems.append(f"{key}: {' '.join(str(error).split()) or type(error).__name__}; correct its arguments")


def _check_kind(node: Any, key: str, kind: type, problems: list[str]) -> None:
    """What is made is a ``kind``, as far as it can be told before: a class that is one, or a function in Python."""
    call = building.target(node, key, []) if is_node(node) else None
    if call is not None and not (issubclass(call, kind) if isinstance(call, type) else inspect.isfunction(call)):
        problems.append(f"{key}._target_: found {node['_target_']!r}, needed a {kind.__name__} of Lightning's")


def _made_kind(made: Any, node: Any, key: str, kind: type, problems: list[str]) -> Any:
    """What was built if it is a ``kind``; None, with the problem noted, if it is something else."""
    if made is None or isinstance(made, kind):
        return made
    problems.append(
        f"{key}._target_: found {node['_target_']!r}, needed a subclass of {kind.__module__}.{kind.__name__}"
    )
    return None


def _watchers(callbacks: Mapping[str, Any], trainer: Mapping[str, Any], problems: list[str]) -> list[Watcher]:
    """The callbacks that measure, as far as they are valid."""
    found = []
    for name, node in callbacks.items():
        if not (is_node(node) and is_watcher(node)):
            continue
        own: list[str] = []
        made = building.build(node, f"callbacks.{name}", own)
        problems += [problem for problem in own if problem not in problems]
        if made is None:
            continue
        if made.whole_weights and splits(trainer):
            problems.append(
                f"callbacks.{name}: it needs the whole model on one device, and this trainer splits it; leave it out "
                "or use trainer=ddp"
            )
        found.append(made)
    return found


def _metrics(watchers: Collection[Watcher]) -> Iterator[tuple[str, Better | None]]:
    for watcher in watchers:
        yield from watcher.metrics.items()


def _best_problems(checkpoint: CheckpointSettings, known: Mapping[str, Better | None], stage: int) -> Iterator[str]:
    """Whether what chooses the best adapter of a stage is measured there."""
    best, guard = checkpoint.best, checkpoint.guard
    if best is None:
        return
    usable = [name for name, better in known.items() if better is not None]
    if best in known and best not in usable:
        yield (
            f"checkpoint.best: {best!r} cannot choose an adapter, since one direction is not better than the other; "
            f"choose one of {', '.join(usable)}"
        )
    elif best not in usable:
        cure = "; set data.validation for val/... or callbacks=[probe] for probe/..."
        yield (
            f"checkpoint.best: nothing logs {best!r} in stage {stage}"
            f"{did_you_mean(best, usable, 'metrics') if usable else cure}"
        )
    elif guard is not None and guard not in known:
        yield (
            f"checkpoint.guard: nothing logs {guard!r} in stage {stage}; add callbacks=[probe], or choose the best "
            "adapter without a guard with checkpoint.guard=null"
        )


def _optimized_problems(
    plain: Plain,
    benchmarks: Mapping[str, Benchmark],
    watchers: Collection[Watcher],
    validated: bool,
    run_stages: Collection[int],
) -> Iterator[str]:
    """Whether results can hold what ``optimized_metric`` names, as far as that is known before."""
    watched = {name.partition("/")[0] for name, _ in _metrics(watchers)} if run_stages else set()
    places = {*benchmarks, *watched, *({VALIDATION.rstrip("/")} if validated and run_stages else ())}
    for name in optimized_metrics(plain):
        if not re.search(r".[./].", name) or re.split(r"[./]", name)[0] not in places:
            columns = [column["key"] for column in suite.columns({n: b for n, b in benchmarks.items() if b})]
            yield (
                f"optimized_metric: results will not hold {name!r}"
                f"{did_you_mean(name, [*columns, *dict(_metrics(watchers))], 'scores')}; validation and probe give "
                "val/... and probe/... where they are on"
            )


def optimized_metrics(plain: Plain) -> list[str]:
    """The names in ``optimized_metric``, none, one or several."""
    names = plain.optimized_metric
    return names if isinstance(names, list) else [names] if names else []


def _check_reader(node: Any, problems: list[str]) -> None:
    call = building.target(node, "data.format", []) if is_node(node) else None
    try:
        if call is not None:
            inspect.signature(call).bind("preferences", "images", None)
    except TypeError:
        problems.append(
            f"data.format._target_: {node['_target_']!r} does not take preferences, images and skipped; name a reader, "
            "as povid.preferences.formats.povid.read is"
        )


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(key, value) of everything in a tree of mappings and lists."""
    members = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else None
    if members is None:
        yield key, value
    else:
        for name, member in members:
            yield from _leaves(member, f"{key}.{name}" if key else str(name))


def _run_stages(plain: Plain | None, ablation: Ablation | None, problems: list[str]) -> tuple[int, ...]:
    """The stages that this run trains."""
    if plain is None or ablation is None:
        return ()
    if plain.stage == "all":
        return tuple(ablation.stages)
    if plain.stage not in ablation.stages:
        has = " and ".join(map(str, ablation.stages)) or "none: it is the base model"
        other = {1: "text or ablation=both", 2: "noise or ablation=both"}[plain.stage]
        problems.append(
            f"stage: ablation {ablation.name!r} has no stage {plain.stage} (it has {has}); use ablation={other}"
        )
        return ()
    return (plain.stage,)


def _rules(
    plain: Plain | None,
    ablation: Ablation | None,
    stages: Mapping[int, StageSettings | None],
    model: Any,
    distortion: Distortion | None,
    trainer: Mapping[str, Any],
    terms: Mapping[int, frozenset[str]],
) -> Iterator[str]:
    """Problems between settings that are valid by themselves."""
    strategy, arguments = _strategy(trainer)
    zero = arguments.get("stage", 2) if issubclass(strategy, DeepSpeedStrategy) else 0  # 2 is Lightning's default
    pieces = issubclass(strategy, (FSDPStrategy, ModelParallelStrategy)) and not issubclass(strategy, FSDP2)
    if pieces or zero not in (0, 1, 2):
        found = trainer["strategy"]["_target_"] if is_node(trainer["strategy"]) else trainer["strategy"]
        yield (
            f"trainer.strategy: found {found}{f' with stage {zero}' if zero else ''}, which splits the weights and "
            "would save adapters in pieces; use trainer=fsdp2 to split weights"
        )
    for number, stage in stages.items():
        if stage is not None and stage.batch_size == "auto":
            if trainer.get("devices") != 1:
                yield f"stages.{number}.batch_size: auto is decided on one device; use trainer.devices=1 or a number"
            elif splits(trainer):
                yield (
                    f"stages.{number}.batch_size: auto is measured with the whole model on the device, and this "
                    "trainer splits it; give a number"
                )
    if ablation:
        yield from (f"stages.{n}: missing, and the ablation trains it" for n in ablation.stages if n not in stages)
    if getattr(distortion, "wrap_around", False) and any(t & ON_DISTORTED - {"noise_on_clean"} for t in terms.values()):
        yield (
            "noise.wrap_around: 8-bit wrap-around belongs to the released code, which scores y_l^n on the clean image; "
            "it needs objective=released"
        )
    if getattr(model, "compile", False) and splits(trainer):
        yield "model.compile: layers whose weights the trainer splits are not compiled; use trainer=ddp or false"
    if model is not None and not model.trainable:
        if ablation and ablation.stages:
            yield (
                f"ablation: {ablation.name!r} trains and a served model can only be evaluated; use ablation=none or "
                "another model"
            )
        if plain and (plain.adapters or plain.init_from):
            yield "adapters: a served model takes none; merge them, serve the result and name that"
    if plain and plain.init_from is not None and not Path(plain.init_from).exists():
        yield f"init_from: {plain.init_from} does not exist; name a run folder or an adapter folder"
    for folder in plain.adapters if plain else ():
        if not (Path(folder) / "adapter_config.json").is_file():
            yield f"adapters: {folder} holds no adapter_config.json; name folders that hold an adapter"
