"""The one exception for errors that a user can fix, and sentences for invalid settings."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

Settings = TypeVar("Settings", bound=BaseModel)


def holds_login(text: str) -> bool:
    """Whether a text is an address with a user name or password, which must not be written to files."""
    return bool(re.search(r"://[^/\s'\"]*@", text))


class Fault(Exception):
    """An error that a user can fix, in one sentence: the file, record or key, what was found, what to do.

    Commands catch it, print ``error: <sentence>`` and exit with status 2, without a traceback.
    """


def did_you_mean(name: str, known: Collection[str], kind: str = "settings") -> str:
    """The end of a sentence about a name that does not exist: the nearest one, or all of them."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; the {kind} are {', '.join(known)}"


def validated(kind: type[Settings], values: Mapping[str, Any], key: str = "") -> Settings:
    """``kind(**values)``. Raises Fault naming every invalid setting at once; ``key`` is where the settings belong."""
    try:
        return kind(**values)
    except ValidationError as error:
        raise Fault("; ".join(sentences(error.errors(), key, kind))) from None


def sentences(details: Sequence[Any], key: str, model: type[BaseModel], path: str = "") -> list[str]:
    """``KEY: found ..., needed ...`` for pydantic's errors; the members of a union share one sentence."""
    found: dict[str, str] = {}
    for detail in details:
        place = detail["loc"]
        name = ".".join([*([key] if key else []), *(str(part) for part in place)])
        if not place:
            found[name] = f"{key}: {_reason(detail)}" if key else _reason(detail)
        elif detail["type"] == "extra_forbidden":
            what = f"{path} takes no such argument" if path else "there is no such setting"
            known = model.model_fields if len(place) == 1 else _fields_at(model, place[:-1])
            found[name] = f"{name}: {what}{did_you_mean(str(place[-1]), known)}"
        elif detail["type"] == "missing":
            found[name] = f"{name}: missing; give it a value"
        else:
            field = model.model_fields.get(str(place[0]))
            union = field is not None and _members(field.annotation)
            if union and len(place) == 2 and not isinstance(place[1], int):
                name = f"{key}.{place[0]}" if key else str(place[0])
                bound = detail["type"] in ("greater_than", "greater_than_equal", "less_than", "less_than_equal")
                either = f"found {_shown(detail['input'])}, needed {spelled(field.annotation)}"
                if name not in found or bound:
                    found[name] = f"{name}: {_reason(detail) if bound else either}"
            else:
                found[name] = f"{name}: {_reason(detail)}"
    return list(found.values())


def _fields_at(model: type[BaseModel], place: tuple[Any, ...]) -> Collection[str]:
    """The names of the settings that a nested model has."""
    for part in place:
        field = model.model_fields.get(str(part))
        kinds = (_members(field.annotation) or (field.annotation,)) if field else ()
        nested = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not nested:
            return ()
        model = nested[0]
    return model.model_fields


def _members(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else ()


_NEEDED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "path_type": "a path",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "literal_error": "{expected}",
    "string_too_short": "text",
    "string_pattern_mismatch": "text without / that does not begin with a space or a dot",
}


def _reason(detail: Mapping[str, Any]) -> str:
    needed = _NEEDED.get(detail["type"])
    if needed is None:
        return detail["msg"].removeprefix("Value error, ")
    needed = needed.format(**detail.get("ctx", {})).replace("'", "")
    return f"found {_shown(detail['input'])}, needed {needed}"


def _shown(value: Any) -> str:
    return "nothing" if value is None else repr(value)


def spelled(hint: Any) -> str:
    """A type in words."""
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", types.NoneType: "null"}
    if _members(hint):
        return " or ".join(spelled(option) for option in _members(hint))
    if typing.get_origin(hint) is typing.Annotated:
        return spelled(typing.get_args(hint)[0])
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(str, typing.get_args(hint)))
    return names.get(hint, getattr(hint, "__name__", str(hint)))
