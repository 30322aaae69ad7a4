"""Draw a table as a picture, with column widths measured from the text."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from povid.files import draft
from povid.report.render import DAGGER, Notes
from povid.report.tables import Line, Table

SIZE = 9.0  # points
ROW = 0.25  # inches
PAD = 0.11
MARGIN = 0.25
INK, PALE, RULE, WARN = "#1a1a1a", "#757575", "#444444", "#b3261e"


def draw(table: Table, file: Path) -> Path:
    """Draw ``table`` into the PNG ``file`` (160 dots per inch); return ``file``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(8, 4), dpi=160)
    canvas = FigureCanvasAgg(figure)
    notes = Notes(table)
    head = [
        *table.lead,
        *(
            f"{column.title}$_{{{column.subscript}}}${column.arrow}" if column.subscript else column.heading
            for column in table.columns
        ),
    ]
    numbers_from = len(table.lead)

    def measure(text: str, **style: Any) -> float:
        drawn = figure.text(0, 0, text, fontsize=SIZE, **style)
        extent = drawn.get_window_extent(canvas.get_renderer()).width / figure.dpi
        drawn.remove()
        return extent

    rows = [(line, _texts(line, table, notes)) for block in table.blocks for line in block.lines]
    widths = [
        max(
            [measure(text, weight="bold") for text in (head[column], *(texts[column] for _, texts in rows)) if text]
            or [0.1]
        )
        + 2 * PAD
        for column in range(len(head))
    ]
    total = sum(widths)
    prose = _wrap([("", note) for note in table.notes] + list(notes), total)
    block_notes = [
        [(line, WARN) for line in _wrap([("", text) for text in block.warnings], total)]
        + [(line, INK) for line in _wrap([("", text) for text in block.notes], total)]
        for block in table.blocks
    ]
    height = (
        2 * MARGIN
        + 0.42
        + ROW * 1.3
        + sum(
            ROW * len(block.lines) + (ROW * 1.25 if block.title else 0.06) + 0.17 * len(wrapped)
            for block, wrapped in zip(table.blocks, block_notes)
        )
        + 0.2
        + 0.17 * len(prose)
    )
    width = total + 2 * MARGIN
    figure.set_size_inches(width, height)

    def put(x: float, y: float, text: str, **style: Any) -> None:
        plain: dict[str, Any] = {"fontsize": SIZE, "color": INK, "va": "center"}
        figure.text(x / width, 1 - y / height, text, **(plain | style))

    def rule(y: float, weight: float, left: float = MARGIN, right: float = width - MARGIN, color: str = RULE) -> None:
        figure.add_artist(Line2D([left / width, right / width], [1 - y / height] * 2, linewidth=weight, color=color))

    y = MARGIN + 0.12
    put(MARGIN, y, f"Table {table.number}. {table.title}", fontsize=12, weight="bold")
    y += 0.3
    rule(y, 1.4)
    edges = [MARGIN + sum(widths[:column]) for column in range(len(widths) + 1)]
    for column, text in enumerate(head):
        right = column >= numbers_from
        put(
            edges[column + 1] - PAD if right else edges[column] + PAD,
            y + ROW * 0.65,
            text,
            weight="bold",
            ha="right" if right else "left",
        )
    y += ROW * 1.3
    for block, wrapped in zip(table.blocks, block_notes):
        rule(y, 0.8)
        if block.title:
            put(MARGIN + PAD, y + ROW * 0.65, block.title, style="italic")
            y += ROW * 1.25
        else:
            y += 0.06
        for text, ink in wrapped:
            put(MARGIN + PAD, y + 0.06, text, fontsize=SIZE - 1, color=ink)
            y += 0.17
        for line in block.lines:
            texts = _texts(line, table, notes)
            ink = WARN if line.says_less else PALE if line.kind == "paper" else INK
            for column, text in enumerate(texts):
                right = column >= numbers_from
                place = line.cells[table.columns[column - numbers_from].key].place if right else 0
                x = edges[column + 1] - PAD if right else edges[column] + PAD
                put(
                    x,
                    y + ROW / 2,
                    text,
                    ha="right" if right else "left",
                    color=ink,
                    weight="bold" if place == 1 else "normal",
                    style="italic" if line.kind == "paper" and not right else "normal",
                )
                if place == 2:
                    rule(y + ROW * 0.84, 0.8, x - measure(text), x, ink)
            y += ROW
    rule(y, 1.4)
    y += 0.2
    for note in prose:
        put(MARGIN, y, note, fontsize=SIZE - 1, color=WARN if note.startswith(DAGGER) else PALE)
        y += 0.17
    with draft(file) as beside:
        figure.savefig(beside, format="png", facecolor="white")
    return file


def _texts(line: Line, table: Table, notes: Notes) -> list[str]:
    lead = [text.replace("$", r"\$") for text in line.lead]
    lead[-1] += (f" {DAGGER}" if line.says_less else "") + _sup(notes.marks(line.notes))
    cells = [line.cells[column.key] for column in table.columns]
    return lead + [
        cell.text(column.decimals) + _sup(notes.marks(cell.notes)) for column, cell in zip(table.columns, cells)
    ]


def _sup(marks: str) -> str:
    return rf"$^{{\mathrm{{{marks}}}}}$" if marks else ""


def _wrap(marked: list[tuple[str, str]], inches: float) -> list[str]:
    letters = max(60, int(inches * 72 / (SIZE - 1) * 1.85))
    lines = []
    for mark, text in marked:
        first, *more = textwrap.wrap(text.replace("$", r"\$"), letters - 4, subsequent_indent="   ") or [""]
        lines += [(f"{DAGGER} " if mark == DAGGER else f"{_sup(mark)} " if mark else "") + first, *more]
    return lines
