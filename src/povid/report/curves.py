"""The training curves of runs: metrics.csv of a stage, and the panels of the page.

A panel is one metric of one stage, with a line per run and the mean of each row's seeds. Any column of metrics.csv,
validation.csv and probe.csv becomes a panel; the part of its name before the first slash is its group.
"""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from povid.report.runs import Row, Run

Points = list[tuple[float, float]]

SMOOTH = 200  # points of a curve; a longer one is averaged in bins to remove jitter
FEWEST = 40  # points of a curve, however many curves there are
ALL_POINTS = 400_000  # of a page
EARLIER = "train/"  # how the names in metrics.csv began in versions before 0.3
MOST_BYTES = 64 * 2**20  # of metrics.csv
MOST_NAMES = 300
MOST_OPEN = 10  # panels of a stage that are shown without a click
DASHES = {"solid": "none", "dash": "9 5", "dot": "2 4", "dashdot": "9 4 2 4", "longdash": "16 6"}
ROW_DASHES = {"none": "dot", "text": "dash", "noise": "dashdot", "both": "solid"}
GENERAL = "loss and optimizer"
FIRST = (GENERAL, "rewards")


def metrics(folder: Path) -> tuple[dict[str, Points], str]:
    """Series of (step, value) by name from a stage's metrics.csv, validation.csv and probe.csv, without blanks and NaN.

    The second value says what is wrong with a file, or "". Lines after a damaged one are not read.
    """
    files = sorted(folder.rglob("metrics.csv"), key=lambda file: file.stat().st_mtime)
    if not files:
        return {}, f"{folder} has no metrics.csv"
    series, problem = read_series(files[-1])
    if earlier := [name for name in series if name.startswith(EARLIER)]:
        problem = problem or (
            f"{files[-1]} is of an earlier version: its loss is drawn; its rewards, on another scale, are not"
        )
        loss = series.get(f"{EARLIER}loss")
        series = {name: points for name, points in series.items() if name not in earlier} | (
            {"loss": loss} if loss else {}
        )
    if not series and not problem:
        problem = f"{files[-1]} holds no numbers"
    for name in ("validation.csv", "probe.csv"):
        if (folder / name).exists():
            found, wrong = read_series(folder / name)
            series, problem = found | series, problem or wrong
    return series, problem


def read_series(file: Path) -> tuple[dict[str, Points], str]:
    """The columns of a CSV file with a column ``step`` (or ``steps``), as :func:`metrics` returns them."""
    problem = ""
    series: dict[str, dict[float, float]] = defaultdict(dict)
    try:
        if not file.is_file():
            return {}, f"{file} is not a file and was not read"
        if file.stat().st_size > MOST_BYTES:
            return {}, f"{file} has more than {MOST_BYTES:,} bytes and was not read"
        with file.open(newline="", encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(csv.DictReader(lines)):
                step = _float(line.get("step", line.get("steps")))
                for name, text in line.items():
                    value = _float(text) if name and name not in ("step", "steps", "epoch") else None
                    if value is not None and (name in series or len(series) < MOST_NAMES):
                        series[name][number if step is None else step] = value
    except (OSError, csv.Error) as error:
        problem = f"{file} is damaged ({error}); its curves end early"
    return {name: sorted(points.items()) for name, points in series.items()}, problem


def _float(text: object) -> float | None:
    try:
        value = float(text)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def binned(points: Points, most: int = SMOOTH) -> Points:
    """At most ``most`` points: neighbours averaged in step and value."""
    width = -(-len(points) // most)
    bins = [points[start : start + width] for start in range(0, len(points), width)]
    return [(_mean([step for step, _ in part]), _mean([value for _, value in part])) for part in bins]


def mean_of(seeds: Sequence[Points]) -> Points:
    """The mean over seeds at the steps that all of them logged: it would jump at a step that only some have."""
    by_step: dict[float, list[float]] = defaultdict(list)
    for points in seeds:
        for step, value in points:
            by_step[step].append(value)
    return [(step, _mean(values)) for step, values in sorted(by_step.items()) if len(values) == len(seeds)]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


@dataclass(frozen=True)
class Curves:
    """What the page needs: rows with colour and dash, groups of panels, and the ``data`` of curves.js."""

    rows: list[dict[str, Any]]
    groups: list[dict[str, Any]]
    data: dict[str, Any]
    spread: bool


def curves(
    rows: Sequence[tuple[Row, str, str]], shown: Sequence[Run], missing: list[str], inside: Path
) -> Curves | None:
    """Panels of ``rows``, each with its label and colour, from the runs among ``shown``; None if nothing was logged.

    A sentence on every file that could not be read is added to ``missing``, with its path relative to ``inside``.
    """
    found: dict[str, dict[int, list[tuple[str, dict[str, Points]]]]] = defaultdict(lambda: defaultdict(list))
    chosen = {run.file for run in shown}
    for place, (row, _, _) in enumerate(rows):
        for run in (run for run in row.runs if run.file in chosen):
            for folder in sorted(run.folder.glob("stage_*")):
                series, problem = metrics(folder)
                if problem:
                    missing.append(problem.replace(f"{inside}/", ""))
                if series:
                    found[folder.name.removeprefix("stage_")][place].append((f"seed {run.seed}", series))
    if not found:
        return None
    lines = sum(len(series) for stage in found.values() for runs in stage.values() for _, series in runs)
    most = max(FEWEST, min(SMOOTH, ALL_POINTS // lines))
    steps: dict[tuple[float, ...], int] = {}
    panels: list[dict[str, Any]] = []
    groups: list[dict[str, Any]] = []
    spread = False
    for stage, by_row in sorted(found.items()):
        names = {name for runs in by_row.values() for _, series in runs for name in series}
        for group, members in _groups(names).items():
            numbers = []
            for name in members:
                panel = _panel(name, by_row, steps, most)
                spread |= panel["spread"]
                numbers.append(len(panels))
                panels.append(panel)
            unfolded = group in FIRST or len(names) <= MOST_OPEN
            groups.append({"title": f"stage {stage}: {group}", "panels": numbers, "open": unfolded})
    styles = [
        {
            "number": number,
            "label": label,
            "color": color,
            "dash": dash,
            "strokes": DASHES[dash],
            "used": any(number in by_row for by_row in found.values()),
        }
        for number, ((_, label, color), dash) in enumerate(zip(rows, _dashes([row.name for row, _, _ in rows])))
    ]
    return Curves(styles, groups, {"rows": styles, "panels": panels, "steps": list(steps)}, spread)


def _groups(names: set[str]) -> dict[str, list[str]]:
    """Names of metrics by group, those of ``FIRST`` in front."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in sorted(names):
        group, slash, _ = name.partition("/")
        found[group if slash else GENERAL].append(name)
    order = sorted(found, key=lambda group: (FIRST.index(group) if group in FIRST else len(FIRST), group))
    return {group: found[group] for group in order}


def _panel(
    name: str,
    by_row: Mapping[int, Sequence[tuple[str, dict[str, Points]]]],
    steps: dict[tuple[float, ...], int],
    most: int,
) -> dict[str, Any]:
    def line(row: int, label: str, points: Points, mean: bool) -> list[Any]:
        points = binned(points, most)
        x = tuple(_short(step) for step, _ in points)
        return [row, label, steps.setdefault(x, len(steps)), [_short(value) for _, value in points], mean]

    thin, thick = [], []
    for row, runs in by_row.items():
        seeds = [(label, series[name]) for label, series in runs if name in series]
        thin += [line(row, label, points, False) for label, points in seeds]
        if len(seeds) > 1 and (mean := mean_of([points for _, points in seeds])):
            thick.append(line(row, f"mean of {len(seeds)} seeds", mean, True))
    return {"name": name, "lines": thin + thick, "spread": bool(thick)}


def _short(value: float) -> float:
    short = float(f"{value:.5g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short


def _dashes(names: Sequence[str]) -> Iterator[str]:
    """A dash per row, so that no two rows of one colour look alike: the paper's rows have their own."""
    seen: set[str] = set()
    others = 0
    for name in names:
        if name in ROW_DASHES and name not in seen:
            yield ROW_DASHES[name]
        else:
            yield list(DASHES)[others % len(DASHES)]
            others += 1
        seen.add(name)


def library() -> bytes:
    """plotly.js, as its Python package holds it."""
    from importlib.util import find_spec

    found = find_spec("plotly")  # importing the package would take time, and only its JavaScript is needed
    return (Path(found.origin).parent / "package_data" / "plotly.min.js").read_bytes()
