"""Imports run downward only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "povid"

# What each part may import of povid. The parts are files or folders of src/povid.
MAY_IMPORT = {
    "fault": set(),
    "machine": set(),
    "objective": set(),
    "noise": set(),
    "packing": set(),
    "digest": {"packing"},
    "fused": {"packing"},
    "policy": {"fault", "fused", "packing"},
    "replies": {"fault"},
    "endpoint": {"fault", "replies"},
    "preferences": {"digest", "fault", "noise", "packing", "preferences", "benchmarks"},
    "benchmarks": {"fault", "benchmarks", "endpoint"},
    "scoring": {"objective", "packing", "policy", "preferences"},
    "reference_cache": {"digest", "objective", "policy", "preferences"},
    "sharding": {"fault", "policy"},
    "generation": {"benchmarks", "fault", "key_values", "packing", "policy", "preferences"},
    "report": {"fault", "report", "benchmarks", "machine"},
}
WINGS = {"scenes", "dispreference", "report", "bench", "adapters"}
EVERYTHING_ELSE_IS_ABOVE = {"module", "memory", "experiment", "config_check"}


def part(file: Path) -> str:
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


def parts_imported(file: Path) -> set[str]:
    names = {name.split(".")[1] for name in imports(file) if name.startswith("povid.")}
    return {name for name in names if (SOURCE / name).is_dir() or (SOURCE / f"{name}.py").exists()}


FILES = sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_imports_run_downward(file):
    own = part(file)
    if own in MAY_IMPORT:
        assert parts_imported(file) <= MAY_IMPORT[own]
    elif own not in WINGS and own not in EVERYTHING_ELSE_IS_ABOVE:
        assert not parts_imported(file) & (EVERYTHING_ELSE_IS_ABOVE | WINGS), f"{own} is no wing and imports one"


def test_only_experiment_imports_wings_and_of_them_two():
    for file in FILES:
        own = part(file)
        if own not in WINGS and own != "__init__":
            allowed = {"report", "dispreference"} if own == "experiment" else set()
            assert parts_imported(file) & WINGS <= allowed, file.name


def test_benchmarks_and_reports_never_import_torch():
    for file in FILES:
        if part(file) in ("benchmarks", "report"):
            assert not {name for name in imports(file) if name.split(".")[0] in ("torch", "transformers", "lightning")}


def test_lightning_and_hydra_stay_where_they_belong():
    lightning = {part(f) if part(f) != "preferences" else f.name for f in FILES
                 if any(name.split(".")[0] == "lightning" for name in imports(f))}
    assert lightning <= {"module", "datamodule.py", "experiment", "checkpoint", "guards", "loggers", "processes",
                         "sharding", "bench"}
    hydra = {str(f.relative_to(SOURCE)) for f in FILES if any(name.split(".")[0] == "hydra" for name in imports(f))}
    assert hydra <= {"experiment.py", "processes.py", "config_check.py", "report/sweep.py", "dispreference/__main__.py"}
