"""Render a table as Markdown, plain text, CSV and LaTeX (booktabs)."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Sequence

from povid.report.tables import OWN_WORDS, OWN_WORDS_MEANS, Cell, Column, Line, Table

DAGGER = "†"


class Notes:
    """Footnotes of a table in order of first mention, one mark per text; a row that says less gets a dagger.

    Marks are letters, because a raised digit after a score would read as an exponent.
    """

    def __init__(self, table: Table) -> None:
        self.lettered: dict[str, str] = {}
        self.daggers: list[str] = []
        for block in table.blocks:
            for line in block.lines:
                if line.says_less and line.says_less not in self.daggers:
                    self.daggers.append(line.says_less)
                for text in (*line.notes, *(note for column in table.columns for note in line.cells[column.key].notes)):
                    self.lettered.setdefault(text, _letters(len(self.lettered)))

    def marks(self, texts: list[str]) -> str:
        return ",".join(self.lettered[text] for text in texts)

    def __iter__(self) -> Iterator[tuple[str, str]]:
        yield from ((DAGGER, text) for text in self.daggers)
        yield from ((letter, text) for text, letter in self.lettered.items())


def _letters(place: int) -> str:
    """a, b ... z, aa, ab ..."""
    return (_letters(place // 26 - 1) if place >= 26 else "") + chr(ord("a") + place % 26)


def markdown(table: Table) -> str:
    """Render as GitHub Markdown: one table per block, then the footnotes."""
    notes = Notes(table)
    parts = [f"## Table {table.number}. {table.title}"]
    for block in table.blocks:
        if block.title:
            parts.append(f"### {_md(block.title)}")
        parts += [f"**{_md(text)}**" for text in block.warnings] + [_md(text) for text in block.notes]
        head = [*map(_md, table.lead), *(_md_heading(column) for column in table.columns)]
        rows = [head, ["---"] * len(table.lead) + ["---:"] * len(table.columns)]
        rows += [_md_line(line, table, notes) for line in block.lines]
        parts.append("\n".join("| " + " | ".join(row) + " |" for row in rows))
    parts.append("\n".join(f"- {_md(note)}" for note in table.notes))
    if marked := [f"- {mark if mark == DAGGER else f'<sup>{mark}</sup>'} {_md(text)}" for mark, text in notes]:
        parts.append("\n".join(marked))
    return "\n\n".join(parts) + "\n"


def markdown_row(scores: Sequence[tuple[Column, Cell]]) -> str:
    """The scores of a single run (``tables.row_of``) as a Markdown table of one row, then their footnotes."""
    notes = list(dict.fromkeys(note for _, cell in scores for note in cell.notes))
    marks = {note: _letters(place) for place, note in enumerate(notes)}
    rows = [
        [_md_heading(column) for column, _ in scores],
        ["---:"] * len(scores),
        [cell.text(column.decimals) + _sup(",".join(marks[note] for note in cell.notes)) for column, cell in scores],
    ]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return "\n\n".join([table, *(f"<sup>{marks[note]}</sup> {_md(note)}" for note in notes)])


def _md(text: str) -> str:
    """Names come from other people's files: no link, no picture (which a viewer would load), no HTML."""
    for letter in "&\\|*_<>`[]":
        text = text.replace(letter, {"&": "&amp;", "<": "&lt;", ">": "&gt;"}.get(letter, "\\" + letter))
    return " ".join(text.split())


def _md_heading(column: Column) -> str:
    return _md(column.title) + (f"<sub>{_md(column.subscript)}</sub>" if column.subscript else "") + column.arrow


def _md_line(line: Line, table: Table, notes: Notes) -> list[str]:
    lead = [f"*{_md(text)}*" if line.kind == "paper" and text not in "✓✗" else _md(text) for text in line.lead]
    if line.says_less:
        lead[-1] += f" {DAGGER}"
    lead[-1] += _sup(notes.marks(line.notes))
    cells = []
    for column in table.columns:
        cell = line.cells[column.key]
        text = cell.text(column.decimals)
        text = {1: f"**{text}**", 2: f"<u>{text}</u>"}.get(cell.place, text)
        cells.append((f"*{text}*" if line.kind == "paper" and text != "–" else text) + _sup(notes.marks(cell.notes)))
    return lead + cells


def _sup(marks: str) -> str:
    return f"<sup>{marks}</sup>" if marks else ""


def plain(table: Table) -> str:
    """Render for a terminal: aligned columns, * for best, _ for second best, no column in which ours are empty."""
    notes = Notes(table)
    parts = [f"Table {table.number}. {table.title}"]
    for block in table.blocks:
        ours = [line for line in block.lines if line.kind != "paper"]
        columns = [
            column for column in table.columns if any(line.cells[column.key].summary.mean is not None for line in ours)
        ]
        rows = [
            [
                *table.lead,
                *(column.heading for column in columns),
            ]
        ]
        for line in block.lines:
            lead = [*line.lead[:-1], line.lead[-1] + (f" {DAGGER}" if line.says_less else "")]
            rows.append(lead + [_plain_cell(line.cells[column.key], column) for column in columns])
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        first = len(table.lead)
        text = [
            "  ".join(
                cell.ljust(width) if i < first else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths))
            ).rstrip()
            for row in rows
        ]
        rule = "-" * max(map(len, text))
        heading = [block.title] if block.title else []
        parts.append("\n".join([*heading, *block.warnings, rule, text[0], rule, *text[1:], rule, *block.notes]))
    parts += [f"{mark} {text}" for mark, text in notes if mark == DAGGER]
    if any(cell.own_words for block in table.blocks for line in block.lines for cell in line.cells.values()):
        parts.append(f"{OWN_WORDS} {OWN_WORDS_MEANS}")
    return "".join(letter for letter in "\n\n".join(parts) if letter == "\n" or ord(letter) >= 32) + "\n"


def _plain_cell(cell: Cell, column: Column) -> str:
    return cell.text(column.decimals) + {1: "*", 2: "_"}.get(cell.place, " ")


def comma_separated(table: Table) -> str:
    """Render as CSV: unrounded mean, sd, se and n per score (empty if missing), and notes in words."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    spread = ("", ".sd", ".se", ".n")
    writer.writerow(
        [
            "table",
            "block",
            "kind",
            "name",
            *table.lead,
            *(_csv_text(f"{column.key}{part}") for column in table.columns for part in spread),
            "says_less",
            "notes",
        ]
    )
    for block in table.blocks:
        for line in block.lines:
            numbers = [number for column in table.columns for number in _csv_cell(line.cells[column.key])]
            notes = dict.fromkeys(
                (
                    *block.warnings,
                    *line.notes,
                    *(note for column in table.columns for note in line.cells[column.key].notes),
                )
            )
            writer.writerow(
                [
                    table.number,
                    _csv_text(block.title),
                    line.kind,
                    _csv_text(line.name),
                    *(_csv_lead(text) for text in line.lead),
                    *numbers,
                    _csv_text(line.says_less),
                    _csv_text("; ".join(notes)),
                ]
            )
    return out.getvalue()


def _csv_lead(text: str) -> str:
    return {"✓": "yes", "✗": "no"}.get(text, _csv_text(text))


def _csv_text(text: str) -> str:
    """Text that no spreadsheet takes for a formula: what begins like one gets an apostrophe in front."""
    return f"'{text}" if text.lstrip().startswith(("=", "+", "-", "@")) else text


def _csv_cell(cell: Cell) -> tuple[str, ...]:
    found = cell.summary
    if found.mean is None:
        return "", "", "", ""
    return (
        f"{found.mean:.6g}",
        *("" if math.isnan(number) else f"{number:.6g}" for number in (found.sd, found.se)),
        str(found.n or ""),
    )


LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "↓": r"$\downarrow$",
    "↑": r"$\uparrow$",
    "–": "--",
    "−": "$-$",
    "✓": r"\checkmark",
    "✗": r"$\times$",
    DAGGER: r"$\dagger$",
    OWN_WORDS: r"$\ddagger$",
    "<": "$<$",
    ">": "$>$",
    "|": "$|$",
    "[": "{[}",  # at the beginning of a row it would be an argument of the end of the row before, as * would
    "]": "{]}",
    "*": "{*}",
}


def latex_escape(text: str) -> str:
    """Escape every special character and every symbol of these tables for LaTeX."""
    return "".join(LATEX.get(letter, letter) for letter in " ".join(text.split()))


def latex(table: Table) -> str:
    """Render as a ``table*`` that needs the packages booktabs, amssymb (check marks) and graphicx (line width)."""
    notes = Notes(table)
    width = len(table.lead) + len(table.columns)
    head = [*map(latex_escape, table.lead), *map(_latex_heading, table.columns)]
    body = []
    for block in table.blocks:
        body.append(r"\midrule")
        if block.title:
            body += [rf"\multicolumn{{{width}}}{{l}}{{\textit{{{latex_escape(block.title)}}}}} \\", r"\midrule"]
        body += [" & ".join(_latex_line(line, table, notes)) + r" \\" for line in block.lines]
    below = [*(note for block in table.blocks for note in (*block.warnings, *block.notes)), *table.notes]
    marked = [f"{latex_escape(mark)}" if mark == DAGGER else rf"\textsuperscript{{{mark}}}" for mark, _ in notes]
    below_lines = [latex_escape(note) for note in below]
    below_lines += [f"{mark} {latex_escape(text)}" for mark, (_, text) in zip(marked, notes)]
    return "\n".join(
        [
            r"% \usepackage{booktabs,amssymb,graphicx}",
            r"\begin{table*}[t]",
            r"\centering",
            rf"\caption{{{latex_escape(table.title)}}}",
            r"\resizebox{\linewidth}{!}{%",
            rf"\begin{{tabular}}{{{'l' * len(table.lead)}{'r' * len(table.columns)}}}",
            r"\toprule",
            " & ".join(head) + r" \\",
            *body,
            r"\bottomrule",
            r"\end{tabular}}",
            r"\par\smallskip\raggedright\footnotesize",
            *(f"{line}\\par" for line in below_lines),
            r"\end{table*}",
            "",
        ]
    )


def _latex_heading(column: Column) -> str:
    subscript = f"$_{{{latex_escape(column.subscript)}}}$" if column.subscript else ""
    return latex_escape(column.title) + subscript + (f"~{latex_escape(column.arrow)}" if column.arrow else "")


def _latex_line(line: Line, table: Table, notes: Notes) -> list[str]:
    lead = [latex_escape(text) for text in line.lead]
    if line.says_less:
        lead[-1] += r"$^{\dagger}$"
    lead[-1] += _latex_sup(notes.marks(line.notes))
    cells = []
    for column in table.columns:
        cell = line.cells[column.key]
        text = latex_escape(cell.text(column.decimals))
        text = {1: rf"\textbf{{{text}}}", 2: rf"\underline{{{text}}}"}.get(cell.place, text)
        cells.append(text + _latex_sup(notes.marks(cell.notes)))
    if line.kind == "paper":
        lead = [rf"\textit{{{text}}}" if text and text not in (LATEX["✓"], LATEX["✗"]) else text for text in lead]
    return lead + cells


def _latex_sup(marks: str) -> str:
    return rf"\textsuperscript{{{marks}}}" if marks else ""
