"""Tables and figures from run folders: what ``python -m povid.report`` and the end of a sweep do."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from povid.fault import Fault
from povid.report import render
from povid.report.runs import find_runs
from povid.report.tables import table

BELONGS = {
    1: "a run with ablation=none, or trained on vlfeedback, human_preference, rlhf_v or (both) povid_17k",
    2: "a run with ablation=none of a model other than the embedded one",
    3: "a run",
    4: "a run of Table 1 with benchmarks=llava_bench",
}


def write_tables(outputs: Path, out: Path | None = None, only: Sequence[int] = (), pictures: bool = True) -> list[Path]:
    """Write Tables 1 to 4, as far as the runs below ``outputs`` belong to them, and the figures; return the files.

    For each table ``tableN.md``, ``.txt``, ``.csv``, ``.tex`` and ``.png`` in ``out`` (default ``outputs/tables``), and
    ``chair_against_coverage.png`` and ``training_curves.png`` where runs hold what they show. ``only`` names tables.

    Raises:
        Fault: no readable run below ``outputs``, no run for a table named in ``only``, or ``out`` cannot be written.
    """
    runs = find_runs(Path(outputs))
    out = Path(out) if out else Path(outputs) / "tables"
    made = {number: table(number, runs) for number in (only or (3, 1, 2, 4))}
    for number, found in made.items():
        if found is None and number in only:
            raise Fault(f"{outputs} has no run for Table {number}; it needs {BELONGS[number]}")
    try:
        out.mkdir(parents=True, exist_ok=True)
        files = []
        for found in (found for found in made.values() if found):
            stem = out / f"table{found.number}"
            files += [
                _write(stem.with_suffix(".md"), render.markdown(found)),
                _write(stem.with_suffix(".txt"), render.plain(found)),
                _write(stem.with_suffix(".csv"), render.comma_separated(found)),
                _write(stem.with_suffix(".tex"), render.latex(found)),
            ]
            if pictures:
                from povid.report import picture

                files.append(picture.draw(found, stem.with_suffix(".png")))
        if pictures and 3 in made:
            from povid.report import figures

            files += [
                file
                for file in (
                    figures.chair_against_coverage(runs, out / "chair_against_coverage.png"),
                    figures.training_curves(runs, out / "training_curves.png"),
                )
                if file
            ]
    except OSError as error:
        raise Fault(
            f"{out} cannot be written ({error.strerror or error}); free space or name another folder with --out"
        ) from error
    return files


def _write(file: Path, text: str) -> Path:
    temporary = file.with_name(f".{file.name}.part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)
    return file
