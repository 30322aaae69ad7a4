"""Which run ``resume=latest`` means, and whether a run folder may be resumed under a configuration."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from povid import files
from povid.fault import Fault
from povid.machine import conf_folder
from povid.run.identity import flat, is_free
from povid.run.lock import in_progress

COMMAND = "command.yaml"
"""In a run's folder: the command that it was last started with, which a command that is refused does not replace."""

SET_ANEW = ("resume", "hydra.mode", "hydra.run.dir", "hydra.sweep.dir")
KEY = re.compile(r"\w+([.@/]\w+)*")
ADDRESSES = ("base_url", "api_key_env", "tracking_uri")  # where keys are sent


def expand(arguments: Sequence[str]) -> list[str]:
    """The command line with ``resume=latest`` replaced by the run or the sweep that it refers to.

    The overrides of that run come first, so that ``python train.py resume=latest`` is enough; those given now take
    precedence (and are refused later if they would change a number). With ``-m`` only sweeps are considered; folders of
    other users are skipped.

    Raises:
        Fault: there is nothing to resume below ``outputs``, or an override of that run is not taken from a file (see
            :func:`distrusted`).
    """
    if "resume=latest" not in arguments:
        return list(arguments)
    given = [argument for argument in arguments if argument != "resume=latest"]
    now = _hydra_arguments(given).overrides
    options = [argument for argument in given if argument not in now]
    outputs = Path(next((a.partition("=")[2].strip("'\"") for a in given if a.startswith("outputs=")), "outputs"))
    sweeps_only = any(option in ("-m", "--multirun") for option in options)
    found = sorted(unfinished(outputs, sweeps_only=sweeps_only))
    waiting = [(started, folder) for started, folder in found if is_own(folder)]
    if not waiting:
        others = f" by you ({len(found)} by others, the newest is {found[-1][1]})" if found else ""
        raise Fault(
            f"{outputs} holds no {'sweep' if sweeps_only else 'run'} that was started{others} and not finished and is "
            "not in progress; leave out resume=latest to start one"
        )
    _, folder = waiting[-1]
    sweep = (folder / "multirun.yaml").exists()
    if sweep and not sweeps_only:
        options.append("-m")
    keys = {_key(argument) for argument in now}
    saved = _saved(folder)
    before = [entry for entry in saved["hydra"] + saved["task"] if _key(entry) not in (*SET_ANEW, *keys)]
    for place in saved.get("config_dirs", ()):
        if not _hydra_arguments(given).config_dir:
            raise Fault(
                f"{folder} was started with --config-dir={place}, which is not taken from there (it holds code); if it "
                "is yours, give it again beside resume=latest"
            )
    for entry in before:
        if reason := distrusted(entry):
            raise Fault(
                f"{folder} was started with {entry!r}, which is not taken from there ({reason}); if it is yours, give "
                "it again after resume=latest"
            )
    quoted = str(folder).replace("\\", "\\\\").replace("'", "\\'")
    return [*options, *before, *now, "resume=true", f"hydra.{'sweep' if sweep else 'run'}.dir='{quoted}'"]


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def _hydra_arguments(arguments: Sequence[str]) -> Any:
    """Hydra's reading of a command line: its options, and ``overrides``."""
    return get_args_parser().parse_args(list(arguments))


def write_command(folder: Path) -> None:
    """Record the command of this process in the folder of its run, for ``resume=latest``; not in a job of a sweep."""
    if HydraConfig.initialized() and not in_sweep(folder):
        hydra: Any = HydraConfig.get()
        command = {
            "config_dirs": config_dirs(hydra),
            "hydra": [*hydra.overrides.hydra],
            "task": [*hydra.overrides.task],
        }
        files.write_text(folder / COMMAND, yaml.safe_dump(command, allow_unicode=True, sort_keys=False))


def config_dirs(hydra: Any) -> list[str]:
    """The folders that ``--config-dir`` names: none, or one."""
    return [source.path for source in hydra.runtime.config_sources if source.provider == "command-line"]


def distrusted(override: str) -> str | None:
    """Why an override is not taken from a file on disk, which somebody else may have written; None if it is taken.

    Taken are values of the settings and the names of files in conf/: nothing of Hydra's own, nothing that names code or
    reads the environment, no address that keys are sent to.
    """
    from povid.run.settings import KEYS

    if re.fullmatch(r"hydra/launcher=\w+", override):  # the name of an installed launcher, with its own settings
        return None
    try:
        parsed = OverridesParser.create().parse_override(override)
        value = parsed.value()
    except (HydraException, RecursionError):
        return "it is not an override"
    key = parsed.key_or_group
    parts = re.split(r"[.@/]", key)
    if (
        not KEY.fullmatch(key)
        or parts[0] not in (*KEYS, "experiment", "sweep")
        or parsed.package not in (None, *_PACKAGES)
    ):
        return "its key is no setting of a run"
    if any(part.startswith("_") for part in parts) or re.search(r"\b_\w+_\b", override):
        return "it names code"
    if re.search(r"\$\{[^}]*:", override):
        return "it holds a resolver"
    if any(address in override for address in ADDRESSES):
        return "keys are sent to it"
    is_group = "." not in key or (conf_folder() / key).is_dir()
    if is_group and any(".." in PurePosixPath(text).parts or text.startswith("/") for text in _names(value)):
        return "it may lead out of conf/" if key not in _PLACES else None
    return None


_PACKAGES = ("stages.1", "stages.2")
_PLACES = ("outputs", "init_from", "adapters")


def _names(value: Any) -> list[str]:
    """All texts in the value of an override, a sweep's choices included."""
    if isinstance(value, str):
        return [str(value)]
    if isinstance(value, Mapping):
        return [text for entry in value.values() for text in _names(entry)]
    members = value if isinstance(value, (list, tuple)) else getattr(value, "list", None) or ()
    return [text for entry in members for text in _names(entry)]


def is_own(folder: Path) -> bool:
    """Whether a folder and what Hydra wrote there belong to the user who runs this."""
    names = ("", COMMAND, "multirun.yaml", ".hydra", ".hydra/hydra.yaml")
    return owned(*(folder / name for name in names))


def owned(*places: Path) -> bool:
    """Whether those of the files and folders that exist belong to the user who runs this."""
    return all(place.stat().st_uid == os.getuid() for place in places if place.exists())


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
            yield (note if not (run / COMMAND).exists() else run / COMMAND).stat().st_mtime, run


def in_sweep(run: Path) -> bool:
    """Whether a run folder is that of a sweep's job."""
    return (run.parent / "multirun.yaml").exists()


def job_count(note: Path) -> int:
    """How many jobs a sweep has, by its multirun.yaml."""
    overrides = OverridesParser.create().parse_overrides(_saved(note.parent)["task"])
    (jobs,) = BasicSweeper.split_arguments(overrides, None)
    return len(jobs)


def _saved(folder: Path) -> dict[str, list[str]]:
    """The overrides, of Hydra's own and of the task, with which the run or sweep in a folder was started.

    Raises:
        Fault: the file that says so is damaged.
    """
    note = folder / "multirun.yaml"
    sweep = note.exists()
    if not sweep:
        note = folder / COMMAND
        note = note if note.exists() else folder / ".hydra" / "hydra.yaml"
    try:
        saved = yaml.safe_load(note.read_text(encoding="utf-8"))
        saved = saved if note.name == COMMAND else saved["hydra"]["overrides"]
        lists = [saved["hydra"], saved["task"], saved.get("config_dirs", [])]
    except (OSError, yaml.YAMLError, UnicodeDecodeError, RecursionError, KeyError, TypeError, AttributeError):
        lists = [None]
    if not all(isinstance(each, list) and all(isinstance(entry, str) for entry in each) for each in lists):
        raise Fault(
            f"{note} does not hold the command line of a run; resume with resume=true "
            f"hydra.{'sweep' if sweep else 'run'}.dir={folder} and the overrides of then"
        )
    return saved


def compare(file: Path, wanted: Mapping[str, Any], bound: Collection[str] = (), unused: Collection[str] = ()) -> None:
    """Refuse to resume a run whose configuration, in ``file``, would give other numbers than ``wanted``.

    ``bound``: keys of FREE that change a number in this run; ``unused``: groups that change none in it.

    Raises:
        Fault: the file is not YAML, or the settings that differ, each with both values.
    """
    try:
        there = dict(flat(yaml.safe_load(file.read_text(encoding="utf-8"))))
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError):
        raise Fault(
            f"{file} cannot be read, so the settings of that run are unknown; start in another folder"
        ) from None
    now = dict(flat(wanted))
    known = [key for key in sorted({*there, *now}) if key.partition(".")[0] not in unused]
    differing = [key for key in known if there.get(key) != now.get(key) and (key in bound or not is_free(key))]
    if differing:
        listed = "; ".join(f"{key} was {there.get(key)!r} and is now {now.get(key)!r}" for key in differing[:8])
        raise Fault(
            f"{file.parent} was started with other settings ({listed}): restore "
            "them to resume it, or start in another folder"
        )
