"""Check the nodes of a configuration against what they build, and build them.

A node is a mapping with a ``_target_``: a class or function and its arguments, as in :func:`hydra.utils.instantiate`.
Its arguments are checked against the names, types and bounds in the target's signature, and every problem is reported
with its key before anything is built.
"""

from __future__ import annotations

import enum
import functools
import inspect
import os
import pkgutil
import re
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, create_model

from povid.fault import sentences, spelled

Kind = TypeVar("Kind", bound=BaseModel)
HYDRA_KEYS = {"_target_", "_partial_", "_convert_", "_recursive_"}


def target(node: Mapping[str, Any], key: str, problems: list[str]) -> Callable | None:
    """The target of a node; None, with the problem noted, if it cannot be imported."""
    path = node.get("_target_")
    try:
        call = pkgutil.resolve_name(path)
        if not callable(call):
            raise TypeError("it is no class or function")
        return call
    except Exception as error:  # importing a module may raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        problems.append(f"{key}._target_: {path!r} cannot be imported ({reason}); name a class or function")
        return None


def check(
    node: Mapping[str, Any],
    key: str,
    problems: list[str],
    given: Collection[str] = (),
    offered: Collection[str] = (),
) -> dict[str, Any] | None:
    """Check a node against its target's signature.

    ``given`` names arguments that only the run passes, ``offered`` those that it passes where the node does not.

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
        optional = model.model_fields if node.get("_partial_") else (*given, *offered)
        problems += _problems(model, arguments, key, node["_target_"], optional)
    return None if len(problems) > before else arguments


def build(node: Mapping[str, Any], key: str, problems: list[str]) -> Any:
    """Check a node and build it; None after a problem.

    What the target itself refuses is noted as a problem too.
    """
    arguments = check(node, key, problems)
    if arguments is None:
        return None
    try:
        return make(node)
    except ValidationError as error:
        problems += sentences(error.errors(), key, BaseModel)
    except Exception as error:  # whatever a target makes of values that its signature does not bound
        named = re.match(r"(\w+): ", str(error))  # our own targets name the argument at fault
        problems.append(f"{key}.{error}" if named and named[1] in arguments else f"{key}: {error}")
    return None


def make(node: Mapping[str, Any], **more: Any) -> Any:
    """Build a node that has been checked; ``more`` are arguments that the run adds.

    With ``_recursive_: false`` the target receives nested nodes unbuilt, to build them when it needs them.
    """
    call = pkgutil.resolve_name(node["_target_"])
    arguments = {name: value for name, value in node.items() if name not in HYDRA_KEYS}
    if node.get("_recursive_", True):
        arguments = {name: _made(value) for name, value in arguments.items()}
    return functools.partial(call, **arguments, **more) if node.get("_partial_") else call(**arguments, **more)


def settings(kind: type[Kind], node: Any, key: str, problems: list[str]) -> Kind | None:
    """``kind`` with the values of a node; None, with every problem noted, if they are invalid."""
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


def _signature_model(call: Any) -> type[BaseModel] | None:
    """A pydantic model with a callable's parameters; None if it takes any keyword."""
    parameters = [p for p in inspect.signature(call).parameters.values() if p.kind is not p.VAR_POSITIONAL]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    try:
        hints = typing.get_type_hints(call.__init__ if inspect.isclass(call) else call, include_extras=True)
        if isinstance(call, type):
            hints = typing.get_type_hints(call, include_extras=True) | hints
    except Exception:  # annotations may name what is imported for type checkers only
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
    except Exception:  # pydantic reserves the name of a parameter
        return None


_CONFIG = ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())


def _problems(
    model: type[BaseModel], arguments: Mapping[str, Any], key: str, path: str = "", optional: Collection[str] = ()
) -> list[str]:
    """The problems of arguments, except nested nodes, which are checked separately.

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
        return sentences(details, key, model, path)
    return [
        f"{key}.{name}: found {value!r}, needed {spelled(model.model_fields[name].annotation)}"
        for name, value in plain.items()
        if _coerced(value, getattr(validated, name, value))
    ]


def _holds_node(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_holds_node, value))
    return is_node(value) or (isinstance(value, Mapping) and any(map(_holds_node, value.values())))


def _coerced(value: Any, validated: Any) -> bool:
    """Whether pydantic changed a value's type (true became 1), except where YAML cannot express the type."""
    if type(value) is type(validated) or not isinstance(value, (bool, int, float, str)):
        return False
    if isinstance(value, bool):
        return True
    if isinstance(value, int) and isinstance(validated, float):
        return False
    return not (isinstance(value, str) and isinstance(validated, (os.PathLike, enum.Enum)))
