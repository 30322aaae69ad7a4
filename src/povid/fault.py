"""The one exception for what a user can mend, and how invalid settings become one."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

Settings = TypeVar("Settings", bound=BaseModel)


class Fault(Exception):
    """Something a user can mend, told in one sentence: the file, record or key at fault, what was found, what to do.

    Commands catch it, print ``error: <sentence>`` and exit with status 2; nobody sees a traceback for a typing error.
    """


def validated(kind: type[Settings], values: Mapping[str, Any], key: str = "") -> Settings:
    """``kind(**values)``. Raises Fault naming every invalid setting at once; ``key`` is where the settings belong."""
    try:
        return kind(**values)
    except ValidationError as error:
        raise Fault("; ".join(invalid(error, kind, key))) from None


def invalid(error: ValidationError, kind: type[BaseModel], key: str = "") -> list[str]:
    """One sentence for each invalid setting: its key (below ``key``), what was found, what is needed."""
    sentences = []
    for one in error.errors():
        path = [str(part) for part in one["loc"]]
        where = ".".join([key, *path] if key else path)
        found = "" if one["type"] in ("missing", "extra_forbidden", "value_error") else f"found {one['input']!r}; "
        says = one["msg"].removeprefix("Value error, ")
        if one["type"] == "missing":
            says = "this setting is required"
        elif one["type"] == "extra_forbidden":
            near = difflib.get_close_matches(path[-1], kind.model_fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the settings are {', '.join(kind.model_fields)}"
            says = f"there is no such setting; {hint}"
        sentences.append(f"{where}: {found}{says[:1].lower()}{says[1:]}" if where else says)
    return sentences
