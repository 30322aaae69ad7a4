"""The words in which a judge is asked: the official ones, read from the official scripts, or our own.

The official texts are not part of this package. ``python -m povid.benchmarks fetch`` downloads the official scripts at
a pinned commit, reads the prompt in them without running them, and keeps it in the benchmark's data folder.
"""

from __future__ import annotations

import ast
import hashlib
import json
import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from povid.fault import Fault
from povid.files import read_json, write_json

if TYPE_CHECKING:
    from povid.benchmarks.benchmark import Benchmark, Source

FILE = "judge_prompt.json"
OFFICIAL = "official"

Choice = Literal["official", "own"] | None


@dataclass(frozen=True, slots=True)
class Wording:
    """``name`` is "official" or the version of ours, ``parts`` the texts of the prompt by name."""

    name: str
    parts: Mapping[str, str]

    @property
    def digest(self) -> str:
        """Sixteen hexadecimal digits that change with any text."""
        return hashlib.sha256(json.dumps(dict(self.parts), sort_keys=True).encode()).hexdigest()[:16]


def store(benchmark: type[Benchmark], data: Path) -> Path | None:
    """Read the official prompt in the scripts that ``fetch`` put into ``data`` and keep it there.

    Returns the file, None for a benchmark without an official prompt. Raises Fault for a script that is not the pinned
    one, or in which the prompt is not found.
    """
    if not benchmark.prompt_sources:
        return None
    texts = {}
    for source in benchmark.prompt_sources:
        file = data / source.file
        _check(source, file)
        texts[source.file.rpartition("/")[2]] = file.read_text(encoding="utf-8")
    parts = benchmark.official_prompt(texts)
    for name, own in benchmark.own_prompt().items():
        if name not in parts or (_fields(own) and _fields(parts[name]) != _fields(own)):
            raise Fault(
                f"{benchmark.name}: the official {name} has another form than is known of it; the prompt stays in our "
                f"own wording ({benchmark.wording})"
            )
    found = Wording(OFFICIAL, {name: parts[name] for name in benchmark.own_prompt()})
    content = {"wording": OFFICIAL, "sources": _sources(benchmark), "parts": found.parts, "digest": found.digest}
    write_json(data / FILE, content)
    return data / FILE


def choose(benchmark: Benchmark, wanted: Choice) -> Wording:
    """The official wording if it was fetched, else our own; ``wanted`` insists on one of them.

    Raises Fault if the official wording is wanted and not there, or was changed after it was fetched.
    """
    own = Wording(benchmark.wording, benchmark.own_prompt())
    folder = benchmark.data if benchmark.data.is_dir() else benchmark.data.parent
    if wanted == "own" or not benchmark.prompt_sources:
        return own
    fetch = f"`python -m povid.benchmarks fetch {benchmark.spelling()} --data {folder}`"
    if not (folder / FILE).is_file():
        if wanted is None:
            return own
        raise Fault(f"{benchmark.name}: {folder} holds no {FILE}, the official prompt; run {fetch}")
    cure = f"run {fetch} to read it again"
    content = read_json(folder / FILE, dict, cure, keys=("sources", "parts", "digest"))
    parts = content["parts"]
    sound = isinstance(parts, dict) and set(parts) == set(own.parts) and all(isinstance(t, str) for t in parts.values())
    if not sound or content["digest"] != Wording(OFFICIAL, parts).digest:
        raise Fault(f"{folder / FILE} was changed after it was fetched; {cure}")
    if content["sources"] != _sources(benchmark):
        raise Fault(f"{folder / FILE} was read from another version of the official script; {cure}")
    return Wording(OFFICIAL, parts)


def _sources(benchmark: Benchmark | type[Benchmark]) -> list[dict[str, str | None]]:
    return [{"url": source.url, "sha256": source.sha256} for source in benchmark.prompt_sources]


def _check(source: Source, file: Path) -> None:
    if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != source.sha256:
        raise Fault(f"{file} is not the official script any more; remove it and run the same command again")


def _fields(text: str) -> list[str]:
    """The names of what a template leaves open, in order."""
    return [name for _, name, _, _ in string.Formatter().parse(text) if name is not None]


class Script:
    """The syntax tree of an official script, in which texts are looked up and nothing is run.

    Every method raises Fault unless it finds exactly one text.
    """

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        try:
            self.tree: ast.AST = ast.parse(text)
        except (SyntaxError, ValueError, RecursionError) as error:
            raise Fault(f"{name} is not a Python script ({error}); remove it and fetch it again") from None

    def inside(self, function: str) -> Script:
        """The body of a function, wherever it is defined."""
        found = Script(self.name, "")
        found.tree = self._one(
            [n for n in ast.walk(self.tree) if isinstance(n, ast.FunctionDef) and n.name == function], function
        )
        return found

    def assigned(self, variable: str) -> str:
        """The text that a variable is first given, of those that are plain text."""
        values = [text for node in self._assignments(variable) if (text := _text(node.value)) is not None]
        return self._one(values[:1], variable)

    def template(self, variable: str, names: Mapping[str, str]) -> str:
        """The f-string that a variable is given, as a template; ``names``: expression in the script → field."""
        pieces = self._one(
            [n.value for n in self._assignments(variable) if isinstance(n.value, ast.JoinedStr)], variable
        )
        text = ""
        for piece in pieces.values:
            if isinstance(piece, ast.Constant):
                text += str(piece.value).replace("{", "{{").replace("}", "}}")
            elif (known := names.get(ast.unparse(piece.value))) is not None:
                text += known
            else:
                raise Fault(f"{self.name}: {variable} holds {ast.unparse(piece.value)}, which is not known of it")
        return text

    def said_by(self, role: str) -> str:
        """The content of the message of a role."""
        found = []
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Dict):
                items = {_text(key): _text(value) for key, value in zip(node.keys, node.values)}
                if items.get("role") == role and items.get("content") is not None:
                    found.append(items["content"])
        return self._one(found, f"message of the {role}")

    def appended(self) -> str:
        """The only text of more than one character that is added to the end of another."""
        found = [
            text
            for node in ast.walk(self.tree)
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add) and len(text := _text(node.right) or "") > 1
        ]
        return self._one(found, "text that is appended")

    def _assignments(self, variable: str) -> list[ast.Assign]:
        return [
            node
            for node in ast.walk(self.tree)
            if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [variable]
        ]

    def _one(self, found: list[Any], what: str) -> Any:
        if len(found) != 1:
            raise Fault(f"{self.name}: found {len(found)} times {what!r}, needed once; the official script has changed")
        return found[0]


def _text(node: ast.AST | None) -> str | None:
    """What a node says, if it is plain text."""
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None
