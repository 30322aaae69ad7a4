"""Write tables and figures from run folders, for ``python -m povid.report`` and at the end of a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from povid.fault import Fault
from povid.files import write_text
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
    """Write those of Tables 1 to 4 that runs below ``outputs`` belong to, and the figures; return the files.

    Each table becomes ``tableN.md``, ``.txt``, ``.csv``, ``.tex`` and ``.png`` in ``out`` (default ``outputs/tables``).
    ``ablations.png``, ``chair_against_coverage.png`` and ``training_curves.png`` are written if runs hold the data.
    ``only`` selects tables by number.

    Raises:
        Fault: no readable run below ``outputs``, no run for a table named in ``only``, or ``out`` cannot be written.
    """
    runs = find_runs(Path(outputs))
    out = Path(out) if out else Path(outputs) / "tables"
    tables = {number: table(number, runs) for number in (only or (3, 1, 2, 4))}
    for number, found in tables.items():
        if found is None and number in only:
            raise Fault(f"{outputs} has no run for Table {number}; it needs {BELONGS[number]}")
    try:
        out.mkdir(parents=True, exist_ok=True)
        files = []
        for found in filter(None, tables.values()):
            stem = out / f"table{found.number}"
            files += [
                write_text(stem.with_suffix(".md"), render.markdown(found)),
                write_text(stem.with_suffix(".txt"), render.plain(found)),
                write_text(stem.with_suffix(".csv"), render.comma_separated(found)),
                write_text(stem.with_suffix(".tex"), render.latex(found)),
            ]
            if pictures:
                from povid.report import picture

                files.append(picture.draw(found, stem.with_suffix(".png")))
        if pictures and 3 in tables:
            from povid.report import figures

            drawn = (
                figures.ablations(runs, out / "ablations.png"),
                figures.chair_against_coverage(runs, out / "chair_against_coverage.png"),
                figures.training_curves(runs, out / "training_curves.png"),
            )
            files += filter(None, drawn)
    except OSError as error:
        raise Fault(
            f"{out} cannot be written ({error.strerror or error}); free space or name another folder with --out"
        ) from error
    return files
