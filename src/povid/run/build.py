"""Nodes of a configuration checked against what they build, and built.

A node is a mapping with a ``_target_``: a class or function and its arguments, as in :func:`hydra.utils.instantiate`.
Its arguments are held against the names, types and bounds of the target's own signature, and every problem is reported
with its key before anything is made.
"""

from __future__ import annotations

import difflib
import enum
import functools
import inspect
import os
import pkgutil
import re
import types
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, create_model

Kind = TypeVar("Kind", bound=BaseModel)
HYDRA_KEYS = {"_target_", "_partial_", "_convert_", "_recursive_"}


def did_you_mean(name: str, known: Collection[str], kind: str = "settings") -> str:
    """The end of a sentence about a name that does not exist: the nearest one, or all of them."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; the {kind} are {', '.join(known)}"


def target(node: Mapping[str, Any], key: str, problems: list[str]) -> Callable | None:
    """What a node builds; None, with the problem noted, where it cannot be imported."""
    path = node.get("_target_")
    try:
        return pkgutil.resolve_name(path)
    except Exception as error:  # whatever importing somebody's module raises
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        problems.append(f"{key}._target_: {path!r} cannot be imported ({reason}); name a class or function")
        return None


def check(node: Mapping[str, Any], key: str, problems: list[str], given: Collection[str] = ()) -> dict[str, Any] | None:
    """Hold a node against its target's signature. ``given`` names arguments that the program itself will pass.

    Returns its validated arguments, nested nodes unbuilt; None after a problem.
    """
    call = target(node, key, problems)
    if call is None:
        return None
    arguments = {name: value for name, value in node.items() if name not in HYDRA_KEYS}
    before = len(problems)
    for name, value in arguments.items():
        if is_node(value):
            check(value, f"{key}.{name}", problems)
    own = [name for name in arguments if name in given]
    problems += [f"{key}.{name}: the run sets this itself; remove it" for name in own]
    model = call if isinstance(call, type) and issubclass(call, BaseModel) else _signature_model(call)
    if model is not None:
        optional = model.model_fields if node.get("_partial_") else given
        problems += _problems(model, arguments, key, node["_target_"], optional)
    return None if len(problems) > before else arguments


def build(node: Mapping[str, Any], key: str, problems: list[str]) -> Any:
    """Check a node and build it; None after a problem.

    What the target itself refuses (ValueError, TypeError, an import that fails) is a problem like any other.
    """
    arguments = check(node, key, problems)
    if arguments is None:
        return None
    try:
        return make(node)
    except ValidationError as error:
        problems += _sentences(error.errors(), key, BaseModel)
    except (ValueError, TypeError, ImportError) as error:
        named = re.match(r"(\w+): ", str(error))  # our own targets name the argument at fault
        problems.append(f"{key}.{error}" if named and named[1] in arguments else f"{key}: {error}")
    return None


def make(node: Mapping[str, Any], **more: Any) -> Any:
    """Build a node that has been checked, with further arguments of the program's own. Lists and mappings are plain."""
    call = pkgutil.resolve_name(node["_target_"])
    arguments = {name: _made(value) for name, value in node.items() if name not in HYDRA_KEYS}
    return functools.partial(call, **arguments, **more) if node.get("_partial_") else call(**arguments, **more)


def settings(kind: type[Kind], node: Any, key: str, problems: list[str]) -> Kind | None:
    """``kind`` with the values of a node; None, with every problem noted, where they do not fit."""
    if not isinstance(node, Mapping):
        problems.append(f"{key}: found {node!r}, needed the settings {', '.join(kind.model_fields)}")
        return None
    found = _problems(kind, node, key)
    problems += found
    return None if found else kind(**node)


def is_node(value: Any) -> bool:
    return isinstance(value, Mapping) and "_target_" in value


def accepted(call: Callable, offered: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``offered`` that ``call`` takes by name."""
    parameters = inspect.signature(call).parameters.values()
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return {name: value for name, value in offered.items() if name in named}


def _made(value: Any) -> Any:
    if is_node(value):
        return make(value)
    if isinstance(value, list):
        return [_made(entry) for entry in value]
    if isinstance(value, Mapping):
        return {name: _made(entry) for name, entry in value.items()}
    return value


def _signature_model(call: Callable) -> type[BaseModel] | None:
    """A pydantic model with a callable's parameters; None where it takes any keyword."""
    parameters = [p for p in inspect.signature(call).parameters.values() if p.kind is not p.VAR_POSITIONAL]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    try:
        hints = typing.get_type_hints(call.__init__ if isinstance(call, type) else call, include_extras=True)
        if isinstance(call, type):
            hints = typing.get_type_hints(call, include_extras=True) | hints
    except Exception:  # annotations that name what is imported for type checkers alone
        hints = {}
    fields: dict[str, Any] = {}
    for parameter in parameters:
        hint = hints.get(parameter.name, Any)
        try:
            TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
        except Exception:  # a type that pydantic has no schema for
            hint = Any
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[parameter.name] = (hint, default)
    try:
        return create_model("Arguments", __config__=_CONFIG, **fields)
    except Exception:  # a parameter whose name pydantic keeps for itself
        return None


_CONFIG = ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())


def _problems(
    model: type[BaseModel], arguments: Mapping[str, Any], key: str, path: str = "", optional: Collection[str] = ()
) -> list[str]:
    """What is wrong with arguments. Nested nodes are checked by themselves and stand for what they build.

    ``path`` names what takes the arguments; those of ``optional`` may be missing.
    """
    plain = {name: value for name, value in arguments.items() if not _holds_node(value)}
    try:
        validated = model(**plain)
    except ValidationError as error:
        details = [
            detail
            for detail in error.errors()
            if detail["type"] != "missing" or detail["loc"][0] not in {*optional, *arguments}
        ]
        return _sentences(details, key, model, path)
    return [
        f"{key}.{name}: found {value!r}, needed {_spelled(model.model_fields[name].annotation)}"
        for name, value in plain.items()
        if _coerced(value, getattr(validated, name, value))
    ]


def _sentences(details: list[Any], key: str, model: type[BaseModel], path: str = "") -> list[str]:
    """``KEY: found ..., needed ...`` for pydantic's errors; the members of a union share one sentence."""
    found: dict[str, str] = {}
    for detail in details:
        place = detail["loc"]
        name = ".".join([key, *(str(part) for part in place)])
        if not place:
            found[name] = f"{key}: {_reason(detail)}"
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
                name = f"{key}.{place[0]}"
                bound = detail["type"] in ("greater_than", "greater_than_equal", "less_than", "less_than_equal")
                either = f"found {_shown(detail['input'])}, needed {_spelled(field.annotation)}"
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


def _holds_node(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_holds_node, value))
    return is_node(value) or (isinstance(value, Mapping) and any(map(_holds_node, value.values())))


def _coerced(value: Any, validated: Any) -> bool:
    """Whether pydantic turned a value into one of another kind, as true into 1, beyond what YAML cannot tell apart."""
    if type(value) is type(validated) or not isinstance(value, (bool, int, float, str)):
        return False
    if isinstance(value, bool):
        return True
    if isinstance(value, int) and isinstance(validated, float):
        return False
    return not (isinstance(value, str) and isinstance(validated, (os.PathLike, enum.Enum)))


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
}


def _reason(detail: Mapping[str, Any]) -> str:
    needed = _NEEDED.get(detail["type"])
    if needed is None:
        return detail["msg"].removeprefix("Value error, ")
    needed = needed.format(**detail.get("ctx", {})).replace("'", "")
    return f"found {_shown(detail['input'])}, needed {needed}"


def _shown(value: Any) -> str:
    return "nothing" if value is None else repr(value)


def _spelled(hint: Any) -> str:
    """A type in words."""
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", types.NoneType: "null"}
    if _members(hint):
        return " or ".join(_spelled(option) for option in _members(hint))
    if typing.get_origin(hint) is typing.Annotated:
        return _spelled(typing.get_args(hint)[0])
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(str, typing.get_args(hint)))
    return names.get(hint, getattr(hint, "__name__", str(hint)))
