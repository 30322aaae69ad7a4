"""Figures from run folders: hallucination against coverage, and the training curves of each row."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from povid.benchmarks.yes_no import FEW
from povid.files import draft
from povid.report.curves import binned, mean_of, metrics, read_series
from povid.report.runs import PAPER_ROWS, Row, Run, group, is_number, lookup, summarise
from povid.report.tables import CHAIR, COLLAPSE, COLUMNS, MARKS, Cell, nearest

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

COLORS = {"none": "#4d4d4d", "noise": "#0072b2", "text": "#d55e00", "both": "#009e73"}  # Okabe and Ito
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
RESPONSES = {"chosen": COLORS["both"], "rejected": ALL, "text": COLORS["text"], "noise": COLORS["noise"]}


def chair_against_coverage(runs: Sequence[Run], file: Path) -> Path | None:
    """CHAIR_I (percent, lower is better) over coverage (percent, higher is better), one panel per model and data.

    Each seed is a small dot, each row a large mark with its standard errors. A thin line is the way of a run through
    its stages as its probe measured it, on the probe's pictures. The shaded side is more than ten points of coverage
    below the base. Returns None if no run has both scores.
    """
    shown = [row for row in group(runs) if _points(row)]
    every = sorted({(*row.world, row.limit) for row in shown})
    if not every:
        return None
    # a single row has nothing to be compared with
    worlds = [world for world in every if sum((*row.world, row.limit) == world for row in shown) > 1] or every
    across = min(2, len(worlds))
    down = -(-len(worlds) // across)
    figure = canvas(7.2 * across, 5.2 * down + 0.3)
    for place, world in enumerate(worlds, 1):
        axes = figure.add_subplot(down, across, place)
        rows = [row for row in shown if (*row.world, row.limit) == world]
        inks = colors(rows)
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
        axes.set_title(f"model {world[0]}, data {world[1]}" + (f", {world[2]}" if world[2] else ""), fontsize=10)
        axes.grid(alpha=0.25)
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8.5, frameon=False)
    title = "Hallucination against coverage: lower right is better"
    if any(way(run.folder) for row in shown for run in row.runs):
        title += "\nthin lines: while it trained, on the probe's pictures"
    figure.suptitle(title, fontsize=12)
    return save(figure, file)


def ablations(runs: Sequence[Run], file: Path) -> Path | None:
    """The paper's four rows in CHAIR_S, CHAIR_I and POPE F1, with the control beside each, for one model and data.

    Bars and dots are means, whiskers standard deviations over runs. The red line is the control that was fine-tuned on
    the preferred responses for as many steps; a hollow dot is F1 among the answers that say yes or no, where more than
    a few do not. Limited runs are left out. Returns None unless some model and data has the base and another row.
    """
    rows = [row for row in group(runs) if row.whole and not row.limit]
    worlds = [row.world for row in rows if row.name == "none"]
    shown = next(
        (
            found
            for world in worlds
            if len(found := [row for row in rows if row.world == world and row.name in PAPER_ROWS]) > 1
        ),
        [],
    )
    keys = [key for key in (*CHAIR, "pope.f1") if all(summarise(row, key).mean is not None for row in shown)]
    if not shown or not keys:
        return None
    order = list(PAPER_ROWS)
    shown.sort(key=lambda row: order.index(row.name))
    controls = [row for row in rows if row.name == "preferred_only" and row.world == shown[0].world]
    figure = canvas(3.9 * len(keys) + 1.6, 0.62 * len(shown) + 1.3)
    panels = figure.subplots(1, len(keys), squeeze=False, sharey=True)[0]
    for axes, key in zip(panels, keys):
        _draw_bars(axes, shown, controls, key)
    marks = [" ".join(MARKS[row.name]) for row in shown]
    panels[0].set_yticks(range(len(shown)), [f"{row.label}   {mark}" for row, mark in zip(shown, marks)])
    panels[0].invert_yaxis()
    spread = f"mean ± standard deviation over {max(len(row.runs) for row in shown)} runs; " * any(
        len(row.runs) > 1 for row in shown
    )
    control = "red line: fine-tuning on the preferred responses alone, as many steps; " * bool(controls)
    valid = "hollow dot: F1 of the answers that say yes or no; " * ("pope.f1" in keys)
    figure.supxlabel(f"{spread}{control}{valid}✓ ✗: text dispreference, image distortion", fontsize=8, color="#555555")
    return save(figure, file)


def _draw_bars(axes: Axes, rows: Sequence[Row], controls: list[Row], key: str) -> None:
    column, bars = COLUMNS[key], key in CHAIR
    ends = []
    for place, (row, ink) in enumerate(zip(rows, colors(rows))):
        found = summarise(row, key)
        spread = 0.0 if math.isnan(found.sd) else found.sd
        points = [found.mean]
        if bars:
            axes.barh(place, found.mean, height=0.6, color=ink, alpha=0.75)
        else:
            axes.plot(found.mean, place, marker="o", ms=7, color=ink)
            valid, invalid = (summarise(row, f"pope.{name}").mean for name in ("f1_valid", "invalid"))
            if valid is not None and invalid is not None and invalid >= FEW:
                axes.plot(valid, place, marker="o", ms=7, mec=ink, mfc="white")
                points.append(valid)
        if spread:
            axes.errorbar(found.mean, place, xerr=spread, color=ALL, lw=1.2, capsize=3)
        if controls and row.name != "none":
            at = summarise(nearest(row, controls), key).mean
            if at is not None:
                axes.plot([at, at], [place - 0.38, place + 0.38], color="#b3261e", lw=2)
                points.append(at)
        ends.append((place, max(*points, found.mean + spread), Cell(found).text(column.decimals)))
    left, right = axes.get_xlim()
    for place, end, text in ends:
        axes.annotate(text, (end, place), xytext=(7, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_xlim(0 if bars else left, right + 0.45 * (right - (0 if bars else left)))
    arrow = "↓" if column.better == "low" else "↑"
    axes.set_title(f"{column.title}$_{column.subscript}$ {arrow}" if column.subscript else f"{column.title} F1 {arrow}")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _draw_row(axes: Axes, row: Row, ink: str) -> None:
    points = _points(row)
    axes.scatter([x for x, _ in points], [y for _, y in points], s=14, color=ink, alpha=0.45, lw=0, zorder=2)
    for run in row.runs:
        steps = way(run.folder)
        if len(steps) > 1:
            axes.plot(*zip(*steps), color=ink, alpha=0.55, lw=0.9, marker=".", ms=3.5, zorder=1)
            axes.annotate("", steps[-1], steps[-2], arrowprops={"arrowstyle": "->", "color": ink, "alpha": 0.7})
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


def way(run: Path) -> list[tuple[float, float]]:
    """(coverage, CHAIR_I) in percent at the steps at which a run's probe measured both, through all of its stages."""
    points: list[tuple[float, float]] = []
    for file in sorted(run.glob("stage_*/probe.csv")):
        series, _ = read_series(file)
        coverage, chair = (dict(series.get(f"probe/chair/{score}", ())) for score in ("coverage", "CHAIR_I"))
        measured = [(coverage[step], chair[step]) for step in sorted(coverage.keys() & chair.keys())]
        points += measured[1:] if points[-1:] == measured[:1] else measured
    return points


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
                series, problem = metrics(folder)
                if problem:
                    log.warning(problem)
                if series:
                    stages[folder.name.removeprefix("stage_")].append(series)
        where = f"\n{row.world[0]}, {row.world[1]}" if several else ""
        where += f"\n{row.limit}" if row.limit else ""
        columns += [(f"{row.label}, stage {stage}{where}", found) for stage, found in sorted(stages.items())]
    logged = {name for _, found in columns for series in found for name in series}
    panels = [(title, names) for title, prefixes in PANELS if (names := _lines(prefixes, logged))]
    if not panels:
        return None
    figure = canvas(max(3.3 * len(columns), 5.0), 2.15 * len(panels) + 0.7)
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
            if any(axes.get_legend_handles_labels()[1]):
                axes.legend(fontsize=8, frameon=False)
            axes.grid(alpha=0.25)
    return save(figure, file)


def _draw_series(axes: Axes, seeds: list[list[tuple[float, float]]], legend: str, ink: str) -> None:
    if not seeds:
        return
    if len(seeds) > 1:
        for points in seeds:
            axes.plot(*zip(*binned(points)), color=ink, alpha=0.25, lw=0.8)
    mean = mean_of(seeds)
    if mean:
        axes.plot(*zip(*binned(mean)), color=ink, lw=1.8, label=legend, marker="o" if len(mean) == 1 else "")


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


def colors(rows: Sequence[Row]) -> list[str]:
    """One colour per row: the paper's four rows have their own; a second setting of one and controls take the next."""
    more, used, inks = iter(MORE * (len(rows) + 1)), set(), []
    for row in rows:
        ink = COLORS[row.name] if row.name in PAPER_ROWS and row.name not in used else next(more)
        used.add(row.name)
        inks.append(ink)
    return inks


def canvas(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, file: Path) -> Path:
    with draft(file) as beside:
        figure.savefig(beside, format="png", facecolor="white")
    return file
