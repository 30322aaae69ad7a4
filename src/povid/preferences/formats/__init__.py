"""Formats of preference data, one file each.

A format is a module with ``read(preferences, images=None, skipped=None) -> list[Triple]`` and, where data can be
written in it, ``write(triples, preferences, images)``:

- ``preferences`` is a .json, .jsonl, .csv or .parquet file, a folder of parquet shards, or hf://datasets/OWNER/NAME;
- ``images`` is the folder of the pictures (``None`` if the records carry them);
- ``skipped`` decides about records that cannot be used: ``None`` raises a Fault, a list takes a sentence for each.

:func:`povid.preferences.records.gather` reads any of these record by record, and
:func:`povid.preferences.pictures.find_picture` leaves pictures inside records on disk: bytes in parquet arrive as
:class:`povid.preferences.stored.Stored`.

A run names the reader as a node, ``data.format: {_target_: povid.preferences.formats.trl.read, _partial_: true}``, and
calls it with these three arguments, so that a function in anybody's own package works as well.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable
from types import ModuleType
from typing import Any

from povid.fault import Fault


def names(function: str = "read") -> list[str]:
    """Names of the formats in this folder that have ``function``: read or write."""
    found = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return [name for name in found if hasattr(importlib.import_module(f"{__name__}.{name}"), function)]


def find(name: str, function: str = "read") -> Callable[..., Any]:
    """The ``function`` (read or write) of a format.

    ``name`` is a module of this folder (``trl``), or the dotted path of a module or a function elsewhere
    (``my_package.my_format``).

    Raises:
        Fault: there is no such format, or it has no such function.
    """
    usable = names(function)
    near = difflib.get_close_matches(name, usable, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"use {', '.join(usable)}, or the dotted path of your own"
    try:
        found = pkgutil.resolve_name(f"{__name__}.{name}" if name in names() else name)
    except (ImportError, AttributeError, ValueError) as error:
        raise Fault(f"format {name!r} of preference data cannot be found ({error}); {hint}") from None
    if isinstance(found, ModuleType):
        found = getattr(found, function, None)
    if not callable(found):
        raise Fault(f"format {name!r} of preference data has no function {function!r}; {hint}")
    return found
