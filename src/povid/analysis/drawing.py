"""What the figures of all analyses share: canvas, colours, files, and which of them need not be measured again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from povid.analysis.subject import Subject
from povid.fault import Fault
from povid.files import draft, read_json, write_json
from povid.machine import versions
from povid.report.figures import COLORS, MORE
from povid.report.runs import PAPER_ROWS, group
from povid.run.identity import digest

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

WIDTH = 7.2  # inches: at 700 pixels a point is then 1.35 pixels
TRUE, PARTNER = "#1b6ca8", "#c8553d"


def canvas(height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def title(figure: Figure | SubFigure, text: str, below: str = "") -> None:
    """A bold line, and a plain one below it."""
    figure.suptitle(f"{text}\n{below}" if below else text, fontsize=11, x=0.01, ha="left")


def bare(axes: Axes, picture: Any = None, name: str = "") -> None:
    """An axis without frame or ticks, with a picture in it and its name above."""
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_visible(False)
    if picture is not None:
        axes.imshow(picture)
    axes.set_title(name, fontsize=8.5)


def save(figure: Figure, file: Path, content: Mapping[str, Any], *, noisy: bool = False) -> list[Path]:
    """Write a figure and the JSON of the same name that belongs to it.

    ``noisy``: pictures with noise, of which PNG files become large, are in it; all colours are reduced to 256.
    """
    with draft(file) as beside:
        figure.savefig(beside, format="png", facecolor="white")
        if noisy:
            with Image.open(beside) as drawn:
                small = drawn.convert("RGB").quantize(256, dither=Image.Dither.NONE)
            small.save(beside, format="png", optimize=True)
    return [file, write_json(file.with_suffix(".json"), content)]


def head(name: str, subject: Subject, measure: Mapping[str, Any]) -> dict[str, Any]:
    """How a JSON about one model begins; ``measure`` is everything else that its numbers depend on."""
    return {
        "analysis": name,
        "digest": subject.digest,
        "run": subject.record(),
        "measure": {"digest": digest(dict(measure)), **measure},
        "versions": versions(),
    }


def kept(name: str, subject: Subject, measure: Mapping[str, Any]) -> dict[str, Any] | None:
    """What lies in the run folder already, measured on the same model in the same way; None if there is nothing."""
    file = subject.folder / f"{name}.json" if subject.folder else None
    if file is None or not file.exists() or not file.with_suffix(".png").exists():
        return None
    try:
        found = read_json(file, dict, "", ("digest", "measure"))
        same = found["digest"] == subject.digest and found["measure"]["digest"] == digest(dict(measure))
    except (Fault, KeyError, TypeError):  # damaged: measured again
        return None
    return found if same else None


@dataclass(frozen=True)
class Shown:
    """A row of a table: its label, its colour, and what was measured on each of its seeds."""

    label: str
    ink: str
    found: list[dict[str, Any]]


def comparable(measured: Sequence[tuple[Subject, dict[str, Any]]]) -> list[list[tuple[Subject, dict[str, Any]]]]:
    """Measurements of the same model and data, made in the same way."""
    groups: dict[Any, list[tuple[Subject, dict[str, Any]]]] = {}
    for subject, found in measured:
        world = subject.run.world if subject.run else None
        groups.setdefault((found["measure"]["digest"], world), []).append((subject, found))
    return list(groups.values())


def rows(measured: Sequence[tuple[Subject, dict[str, Any]]]) -> list[Shown]:
    """What was measured, by row; only runs that differ in the seed alone share one."""
    by_file = {subject.run.file: found for subject, found in measured if subject.run}
    grouped = group([subject.run for subject, _ in measured if subject.run])
    labelled = [(row.name, row.label, [by_file[run.file] for run in row.runs]) for row in grouped]
    labelled += [(subject.row, subject.row, [found]) for subject, found in measured if subject.run is None]
    colours = inks([name for name, _, _ in labelled])
    return [
        Shown(label.replace("_", " "), ink, found) for (_, label, found), ink in zip(labelled, colours, strict=True)
    ]


def inks(names: Sequence[str]) -> list[str]:
    """A colour for each row: the paper's four rows have their own; a second setting of one and controls the next."""
    more, used, found = iter(MORE * (len(names) + 1)), set(), []
    for name in names:
        found.append(COLORS[name] if name in PAPER_ROWS and name not in used else next(more))
        used.add(name)
    return found


def seeds(shown: Sequence[Shown]) -> str:
    """How many seeds the rows have, in words."""
    counts = sorted({len(row.found) for row in shown})
    few, many = counts[0], counts[-1]
    return f"{many} seed{'s' * (many > 1)}" if few == many else f"{few} to {many} seeds"


def mean(values: Sequence[Sequence[float]]) -> list[float]:
    """The mean over seeds of curves."""
    return np.mean(np.asarray(values, dtype=float), axis=0).tolist()


def spread(values: np.ndarray) -> dict[str, list[float]]:
    """Mean, standard deviation and standard error over the first axis [N, ...]; NaN does not occur for one value."""
    values = np.asarray(values, dtype=float)
    count = len(values)
    sd = values.std(axis=0, ddof=1) if count > 1 else np.zeros(values.shape[1:])
    found = {"mean": values.mean(axis=0), "sd": sd, "se": sd / math.sqrt(count)}
    return {name: np.round(value, 6).tolist() for name, value in found.items()}
