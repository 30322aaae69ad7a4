"""Figures from run folders: hallucination against coverage, and the training curves of each row."""

from __future__ import annotations

import csv
import logging
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from povid.files import draft
from povid.report.runs import PAPER_ROWS, Row, Run, group, is_number, lookup
from povid.report.tables import COLLAPSE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

COLORS = {"none": "#4d4d4d", "noise": "#1b6ca8", "text": "#c8553d", "both": "#2a7f4f"}
MORE = ("#8e5aa8", "#b08800", "#00798c", "#a3416b", "#6b705c", "#5c4d7d")
MARKERS = {"none": "s", "noise": "^", "text": "v", "both": "o"}

# Panels from top to bottom: title and beginning of the names in metrics.csv. Where several responses are dispreferred
# the name of each follows.
PANELS = (
    ("loss", ("loss",)),
    ("reward", ("rewards/chosen", "rewards/rejected")),
    ("margin over", ("rewards/margins",)),
    ("share with margin > 0", ("rewards/accuracies",)),
)
ALL = "#1a1a1a"
RESPONSES = {"chosen": "#2a7f4f", "rejected": ALL, "text": "#c8553d", "noise": "#1b6ca8"}
EARLIER = "train/"  # how the names in metrics.csv began in versions before 0.3
SMOOTH = 200  # points of a curve; a longer one is averaged in bins to remove jitter


def chair_against_coverage(runs: Sequence[Run], file: Path) -> Path | None:
    """CHAIR_I (percent, lower is better) over coverage (percent, higher is better), one panel per model and data.

    Each seed is a small dot, each row a large mark with its standard errors. The shaded side is more than ten points of
    coverage below the base. Returns None if no run has both scores.
    """
    shown = [row for row in group(runs) if _points(row)]
    every = sorted({row.world for row in shown})
    if not every:
        return None
    # a single row has nothing to be compared with
    worlds = [world for world in every if sum(row.world == world for row in shown) > 1] or every
    across = min(2, len(worlds))
    down = -(-len(worlds) // across)
    figure = _figure(7.2 * across, 5.2 * down + 0.3)
    for place, world in enumerate(worlds, 1):
        axes = figure.add_subplot(down, across, place)
        rows = [row for row in shown if row.world == world]
        inks = _inks(rows)
        base = next((row for row in rows if row.name == "none"), None)
        for row, ink in zip(rows, inks):
            _draw_row(axes, row, ink)
        if base:
            edge = _mean([x for x, _ in _points(base)]) - COLLAPSE
            left, right = axes.get_xlim()
            left = min(left, edge - 0.07 * (right - edge))
            axes.axvspan(left, edge, color="#b3261e", alpha=0.07, lw=0)
            axes.text(
                edge - 0.015 * (right - left),
                0.98,
                "says less than the base",
                color="#b3261e",
                fontsize=8.5,
                ha="right",
                va="top",
                rotation=90,
                transform=axes.get_xaxis_transform(),
            )
            axes.set_xlim(left, right)
        axes.set_xlabel("coverage: true objects mentioned, % (higher is better)")
        axes.set_ylabel("CHAIR$_I$: hallucinated mentions, % (lower is better)")
        axes.set_title(f"model {world[0]}, data {world[1]}", fontsize=10)
        axes.grid(alpha=0.25)
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8.5, frameon=False)
    figure.suptitle("Hallucination against coverage: lower right is better", fontsize=12)
    return _save(figure, file)


def _draw_row(axes: Axes, row: Row, ink: str) -> None:
    points = _points(row)
    axes.scatter([x for x, _ in points], [y for _, y in points], s=14, color=ink, alpha=0.45, lw=0, zorder=2)
    x, y = _mean([x for x, _ in points]), _mean([y for _, y in points])
    label = row.label + (f" (n = {len(points)})" if len(points) > 1 else "")
    axes.errorbar(
        [x],
        [y],
        xerr=[_error([x for x, _ in points])],
        yerr=[_error([y for _, y in points])],
        color=ink,
        marker=MARKERS.get(row.name, "D"),
        ms=9,
        mec="white",
        mew=1,
        capsize=3,
        lw=1.3,
        ls="none",
        zorder=3,
        label=label,
    )


def _points(row: Row) -> list[tuple[float, float]]:
    pairs = [(lookup(run.benchmarks, "chair.coverage"), lookup(run.benchmarks, "chair.CHAIR_I")) for run in row.runs]
    return [(x, y) for x, y in pairs if is_number(x) and is_number(y)]


def training_curves(runs: Sequence[Run], file: Path) -> Path | None:
    """Loss, rewards and margins over the steps, one column per row and stage, a thin line per seed and their mean.

    Read from ``run_folder/stage_*/**/metrics.csv``. Rewards may belong to any response that an objective names; a panel
    for which nothing was logged is omitted. Returns None if no run logged any.
    """
    columns: list[tuple[str, list[dict[str, list[tuple[float, float]]]]]] = []
    rows = group(runs)
    several = len({row.world for row in rows}) > 1
    for row in rows:
        stages: dict[str, list] = defaultdict(list)
        for run in row.runs:
            for folder in sorted(run.folder.glob("stage_*")):
                series = _metrics(folder)
                if series:
                    stages[folder.name.removeprefix("stage_")].append(series)
        where = f"\n{row.world[0]}, {row.world[1]}" if several else ""
        columns += [(f"{row.label}, stage {stage}{where}", found) for stage, found in sorted(stages.items())]
    logged = {name for _, found in columns for series in found for name in series}
    panels = [(title, names) for title, prefixes in PANELS if (names := _lines(prefixes, logged))]
    if not panels:
        return None
    figure = _figure(max(3.3 * len(columns), 5.0), 2.15 * len(panels) + 0.7)
    grid = figure.subplots(len(panels), len(columns), squeeze=False, sharey="row", sharex="col")
    for down, (title, names) in enumerate(panels):
        for across, (heading, found) in enumerate(columns):
            axes = grid[down][across]
            for name, (legend, ink) in names.items():
                _draw_series(axes, [series[name] for series in found if name in series], legend, ink)
            if down == 0:
                axes.set_title(heading, fontsize=10)
            if across == 0:
                axes.set_ylabel(title)
            if down == len(panels) - 1:
                axes.set_xlabel("step")
            if not axes.has_data():
                axes.text(0.5, 0.5, "not in this stage", transform=axes.transAxes, ha="center", color="#757575")
                axes.grid(False)
                continue
            if any(legend for legend, _ in names.values()):
                axes.legend(fontsize=8, frameon=False)
            axes.grid(alpha=0.25)
    return _save(figure, file)


def _draw_series(axes: Axes, seeds: list[list[tuple[float, float]]], legend: str, ink: str) -> None:
    if not seeds:
        return
    by_step: dict[float, list[float]] = defaultdict(list)
    for points in seeds:
        for step, value in points:
            by_step[step].append(value)
        if len(seeds) > 1:
            axes.plot(*zip(*_binned(points)), color=ink, alpha=0.25, lw=0.8)
    # the mean would jump at a step that only some seeds logged
    mean = [(step, _mean(values)) for step, values in sorted(by_step.items()) if len(values) == len(seeds)]
    if mean:
        axes.plot(*zip(*_binned(mean)), color=ink, lw=1.8, label=legend, marker="o" if len(mean) == 1 else "")


def _binned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most ``SMOOTH`` points: neighbours averaged in step and value."""
    width = -(-len(points) // SMOOTH)
    bins = [points[start : start + width] for start in range(0, len(points), width)]
    return [(_mean([step for step, _ in part]), _mean([value for _, value in part])) for part in bins]


def _metrics(folder: Path) -> dict[str, list[tuple[float, float]]]:
    """Series of (step, value) by name from the newest metrics.csv below a stage's folder, without blanks and NaN."""
    files = sorted(folder.rglob("metrics.csv"), key=lambda file: file.stat().st_mtime)
    series: dict[str, dict[float, float]] = defaultdict(dict)
    if files:
        with files[-1].open(newline="", encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(csv.DictReader(lines)):
                step = _float(line.get("step"))
                for name, text in line.items():
                    value = _float(text) if name and name not in ("step", "epoch") else None
                    if value is not None:
                        series[name][number if step is None else step] = value
    if earlier := [name for name in series if name.startswith(EARLIER)]:
        log.warning(
            "%s is of an earlier version: its loss is drawn, and its rewards, which stand on another scale, are not",
            files[-1],
        )
        series["loss"] = series[f"{EARLIER}loss"]
        for name in earlier:
            del series[name]
    return {name: sorted(points.items()) for name, points in series.items()}


def _float(text: object) -> float | None:
    try:
        value = float(text)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def _lines(prefixes: Sequence[str], logged: set[str]) -> dict[str, tuple[str, str]]:
    """Legend and colour of each logged name of a panel, those of the paper's responses first."""
    found = {}
    for prefix in prefixes:
        side = prefix.partition("/")[2] if len(prefixes) > 1 else ""
        for name in logged:
            if name == prefix:
                found[name] = side
            elif name.startswith(f"{prefix}_"):
                found[name] = name.removeprefix(f"{prefix}_")
    others = iter(MORE * (len(found) + 1))
    order = [*RESPONSES, *sorted(set(found.values()) - {*RESPONSES})]
    names = sorted(found, key=lambda name: order.index(found[name]))
    return {name: (found[name], RESPONSES.get(found[name]) or (next(others) if found[name] else ALL)) for name in names}


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _error(values: Sequence[float]) -> float:
    """Standard error of the mean; 0, which draws no bar, for a single value."""
    if len(values) < 2:
        return 0.0
    mean = _mean(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def _inks(rows: Sequence[Row]) -> list[str]:
    """One colour per row: the paper's four rows have their own; a second setting of one and controls take the next."""
    more, used, inks = iter(MORE * (len(rows) + 1)), set(), []
    for row in rows:
        ink = COLORS[row.name] if row.name in PAPER_ROWS and row.name not in used else next(more)
        used.add(row.name)
        inks.append(ink)
    return inks


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, file: Path) -> Path:
    with draft(file) as beside:
        figure.savefig(beside, format="png", facecolor="white")
    return file
