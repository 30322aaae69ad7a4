"""Why it works: what trained models do inside (paper, Figures 1, 4 and 5). One file each.

An analysis is a module with ``arguments(parser)``, which adds its options, and ``measure(options) -> list[Path]``,
which writes figures (.png) with their numbers (.json) and returns the files. Each JSON holds the ``caption`` of the
figure of the same name and, where it lies in a run folder, the ``digest`` of that run's identity.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType


def analyses() -> dict[str, ModuleType]:
    """The modules of this folder that are an analysis, by name."""
    found = {name: importlib.import_module(f"{__name__}.{name}") for _, name, _ in pkgutil.iter_modules(__path__)}
    return {name: module for name, module in sorted(found.items()) if hasattr(module, "measure")}
