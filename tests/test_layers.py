"""Imports run downward, by folder."""

from __future__ import annotations

import ast
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "src" / "povid"

# A room may import the rooms that stand before it, itself and the ground.
GROUND = {
    "fault": (),
    "files": ("fault",),
    "fetching": ("fault", "files", "fetching"),
    "internals": (),
    "machine": (),
    "terminal": (),
    "pages": ("files", "pages"),
}
ROOMS = ("method", "preferences", "server", "model", "benchmarks", "training", "report", "run")
WINGS = {  # nothing in the rooms imports a wing
    "scenes": {"preferences", "model", "benchmarks", "dispreference"},
    "dispreference": {"server", "preferences", "model", "benchmarks", "run"},
    "bench": set(ROOMS),
    "analysis": {*ROOMS, "dispreference"},
    "arena": {"report", "run"},
    "publish": {"model", "report"},
}
DOORS = ("adapters", "__main__", "__init__")  # command lines, which only call what stands in a room
NO_TORCH = ("benchmarks", "report", "server")


def room(file: Path) -> str:
    return file.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(file: Path) -> set[str]:
    """Full names of the modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name}: relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def rooms_imported(file: Path) -> set[str]:
    names = {name.split(".")[1] for name in imports(file) if name.startswith("povid.")}
    return {name for name in names if (SOURCE / name).is_dir() or (SOURCE / f"{name}.py").exists()}


FILES = sorted(SOURCE.rglob("*.py"))


def test_imports_run_downward():
    for file in FILES:
        own = room(file)
        if own in DOORS:
            continue
        if own in GROUND:
            allowed = set(GROUND[own])
        elif own in WINGS:
            allowed = {*GROUND, own, *WINGS[own]}
        else:
            allowed = {*GROUND, *ROOMS[: ROOMS.index(own) + 1]}
        assert rooms_imported(file) <= allowed, file.relative_to(SOURCE)


def test_every_folder_is_a_room_or_a_wing():
    folders = {path.name for path in SOURCE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders <= {*ROOMS, *WINGS, *GROUND}
    assert len([file for file in SOURCE.glob("*.py") if file.name != "__init__.py"]) <= 7


def test_what_needs_no_model_never_imports_torch():
    for file in FILES:
        if room(file) in NO_TORCH:
            found = {name.split(".")[0] for name in imports(file)}
            assert not found & {"torch", "transformers", "lightning"}, file.relative_to(SOURCE)


def test_lightning_and_hydra_stay_where_they_belong():
    for file in FILES:
        found = {name.split(".")[0] for name in imports(file)}
        if "lightning" in found:
            assert room(file) in ("training", "run", "bench", "internals"), file.relative_to(SOURCE)
        if "hydra" in found:
            assert room(file) in ("run", "dispreference", "analysis") or file.name in ("sweep.py", "__main__.py")
