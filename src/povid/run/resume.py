"""Which run ``resume=latest`` means, and whether a run folder may be resumed under a configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from povid.fault import Fault
from povid.run.lock import in_progress

# What may differ between the attempts of a run: nothing of this changes a number. Benchmarks and their decoding are
# compared with the answers on disk by the suite itself.
FREE = (
    "resume",
    "outputs",
    "logger",
    "samples",
    "checkpoint",
    "benchmarks",
    "judge",
    "generation.batch_size",
    "data.workers",
    "data.cache_mb",
    "trainer.log_every_n_steps",
    "trainer.enable_progress_bar",
)


def expand(arguments: Sequence[str]) -> list[str]:
    """The command line with ``resume=latest`` replaced by the run or the sweep that it stands for.

    The overrides of that run come first, so that ``python train.py resume=latest`` is enough; those given now win (and
    are refused later if they would change a number). ``-m`` looks for sweeps alone.

    Raises:
        Fault: nothing below ``outputs`` waits to be resumed.
    """
    if "resume=latest" not in arguments:
        return list(arguments)
    given = [argument for argument in arguments if argument != "resume=latest"]
    options = [argument for argument in given if argument.startswith("-")]
    outputs = Path(next((a.partition("=")[2].strip("'\"") for a in given if a.startswith("outputs=")), "outputs"))
    sweeps_only = any(option in ("-m", "--multirun") for option in options)
    waiting = sorted(unfinished(outputs, sweeps_only=sweeps_only))
    if not waiting:
        raise Fault(
            f"{outputs} holds no {'sweep' if sweeps_only else 'run'} that was started and not finished and is not in "
            "progress; leave out resume=latest to start one"
        )
    _, folder = waiting[-1]
    sweep = (folder / "multirun.yaml").exists()
    if sweep and not sweeps_only:
        options.append("-m")
    now = [argument for argument in given if not argument.startswith("-")]
    keys = {_key(argument) for argument in now}
    before = [entry for entry in _overrides(folder) if _key(entry) not in keys]
    place = str(folder).replace("\\", "\\\\").replace("'", "\\'")
    return [*options, *before, *now, "resume=true", f"hydra.{'sweep' if sweep else 'run'}.dir='{place}'"]


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def _overrides(folder: Path) -> Iterator[str]:
    """The overrides with which a run or sweep was started, but for the places that are set anew."""
    sweep = folder / "multirun.yaml"
    saved = _saved(sweep if sweep.exists() else folder / ".hydra" / "hydra.yaml")
    for override in (*saved["hydra"], *saved["task"]):
        if _key(override) not in ("resume", "hydra.mode", "hydra.run.dir", "hydra.sweep.dir"):
            yield override


def unfinished(outputs: Path, *, sweeps_only: bool = False) -> Iterator[tuple[float, Path]]:
    """(when last started, folder) of the sweeps and runs that were started, not finished and are not in progress.

    A run is started when its config.yaml is written and finished with its results.json. A sweep is finished when all
    its jobs are and its table is there; jobs whose configuration was refused (error.txt) can never run and leave a
    sweep without its table.
    """
    for note in outputs.rglob("multirun.yaml"):
        jobs = [child for child in note.parent.iterdir() if (child / ".hydra").is_dir()]
        started = any((job / "config.yaml").exists() for job in jobs)
        refused = [job for job in jobs if (job / "error.txt").exists()]
        ended = len(refused) + sum((job / "results.json").exists() for job in jobs)
        if refused:
            finished = ended >= len(jobs) and ended >= job_count(note)
        else:
            finished = ended == len(jobs) and (note.parent / "tables" / "table3.md").exists()
        if started and not finished and not any(map(in_progress, (note.parent, *jobs))):
            yield note.stat().st_mtime, note.parent
    for note in () if sweeps_only else outputs.rglob(".hydra/hydra.yaml"):
        run = note.parent.parent
        open_ = (run / "config.yaml").exists() and not (run / "results.json").exists()
        if open_ and not in_sweep(run) and not in_progress(run):
            yield note.stat().st_mtime, run


def in_sweep(run: Path) -> bool:
    """Whether a run folder is that of a sweep's job."""
    return (run.parent / "multirun.yaml").exists()


def job_count(note: Path) -> int:
    """How many jobs a sweep has, by its multirun.yaml."""
    overrides = OverridesParser.create().parse_overrides(_saved(note)["task"])
    (jobs,) = BasicSweeper.split_arguments(overrides, None)
    return len(jobs)


def _saved(note: Path) -> Mapping[str, Sequence[str]]:
    """The overrides in a hydra.yaml or multirun.yaml.

    Raises:
        Fault: it is not the file that Hydra wrote.
    """
    try:
        saved = yaml.safe_load(note.read_text(encoding="utf-8"))["hydra"]["overrides"]
        return {name: [str(override) for override in saved[name]] for name in ("hydra", "task")}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        raise Fault(
            f"{note} is damaged, so the command that started {note.parent.name} is unknown; repeat that command with "
            "resume=true and hydra.run.dir= or, for a sweep, hydra.sweep.dir="
        ) from None


def compare(file: Path, wanted: Mapping[str, Any]) -> None:
    """Refuse to resume a run whose configuration, in ``file``, would give other numbers than ``wanted``.

    Raises:
        Fault: the file is not YAML, or the settings that differ, each with both values.
    """
    try:
        there = dict(_flat(yaml.safe_load(file.read_text(encoding="utf-8"))))
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError):
        raise Fault(f"{file} cannot be read, so what was run is unknown; start in another folder") from None
    now = dict(_flat(wanted))
    differing = [key for key in sorted({*there, *now}) if there.get(key) != now.get(key) and not _is_free(key)]
    if differing:
        listed = "; ".join(f"{key} was {there.get(key)!r} and is now {now.get(key)!r}" for key in differing[:8])
        raise Fault(
            f"{file.parent} was started with other settings ({listed}): restore "
            "them to resume it, or start in another folder"
        )


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in FREE)


def _flat(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
