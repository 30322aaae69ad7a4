"""What is wrong with a command line, and the cure: Hydra's own messages suggest adding a misspelt key."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from povid.fault import did_you_mean
from povid.machine import conf_folder

NAMES = r"(?!(?i:null|true|false)$)[A-Za-z_]\w*|\[[A-Za-z_]\w*(,[A-Za-z_]\w*)*\]"


def explain(error: Exception, arguments: Sequence[str]) -> str:
    """The sentence for what Hydra raised before any job began."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines)
    if isinstance(error, OverrideParseException):
        override = error.override
        key, _, value = override.partition("=")
        cure = f"'{key}=\"{value}\"'" if value else "'KEY=\"VALUE\"'"
        return (
            f"{override!r} cannot be read as KEY=VALUE; a value with spaces, commas, = or letters beyond ASCII needs "
            f"quotes for the shell and for Hydra: {cure}"
        )
    if found := re.search(r"Could not override '([^']+)'", text):
        return f"{found[0]}: there is no such setting{_nearest(found[1], arguments)}"
    if found := re.search(r"Could not (?:load|find) '([^']+)/([^'/]*)'", text):
        choices = options(found[1])
        if not choices:  # a group of Hydra's own, whose options its message lists
            return text
        near = did_you_mean(found[2], choices)
        near = near if "did you mean" in near else ""
        return f"Could not find '{found[1]}/{found[2]}' Available options in '{found[1]}': {' '.join(choices)}{near}"
    if isinstance(error, (ValueError, TypeError)):  # what Hydra raises for a group's value that is no name
        groups = {file.parent.relative_to(conf_folder()).as_posix() for file in conf_folder().rglob("*.yaml")}
        for argument in arguments:
            key, _, value = argument.partition("=")
            if key.partition("@")[0] in groups and not re.fullmatch(NAMES, value):
                names = ", ".join(options(key.partition("@")[0]))
                return f"{argument}: {key} is chosen by name, of {names}"
    return text


def options(group: str) -> list[str]:
    """The names that a group of conf/ offers."""
    folder = Path(conf_folder()) / group
    return sorted(file.stem for file in folder.glob("*.yaml") if not file.stem.startswith("_"))


def _nearest(key: str, arguments: Sequence[str]) -> str:
    """``; did you mean ...?`` with the nearest key of the configuration that the other arguments make."""
    keys = list(_keys(_composed(arguments)))
    parent = key.rpartition(".")[0]
    beside = [each for each in keys if each.rpartition(".")[0] == parent]
    name = key.rpartition(".")[2]
    near = did_you_mean(name, [each.rpartition(".")[2] for each in beside]) if beside else did_you_mean(key, keys)
    return near if beside or "did you mean" in near else ""


def _composed(arguments: Sequence[str]) -> Any:
    choices = [argument for argument in arguments if re.fullmatch(r"\w+=[\w\[\],]+", argument)]
    for overrides in (choices, []):
        try:
            GlobalHydra.instance().clear()
            with initialize_config_dir(str(conf_folder()), version_base="1.3"):
                return OmegaConf.to_container(compose("config", overrides=overrides))
        except (HydraException, OmegaConfBaseException, ValueError):
            continue
    return {}


def _keys(tree: Any, prefix: str = "") -> Iterator[str]:
    for key, value in tree.items() if isinstance(tree, Mapping) else ():
        yield f"{prefix}{key}"
        yield from _keys(value, f"{prefix}{key}.")
