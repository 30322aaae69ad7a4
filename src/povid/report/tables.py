"""The paper's Tables 1 to 4 with our rows beside the printed ones, as data for render.py and picture.py.

Tables 1 and 3 show the paper's eight scores, then BESIDE, then the columns of any other benchmark that was run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from povid.benchmarks.benchmark import Column
from povid.benchmarks.yes_no import FEW
from povid.report import paper
from povid.report.paper import PaperRow
from povid.report.runs import PAPER_ROWS, Row, Run, Summary, group, lookup, summarise

COLLAPSE = 10.0  # points of coverage below the base
CHAIR = ("chair.CHAIR_S", "chair.CHAIR_I")
REAL = "llava_1_5_7b"
OTHER_DATA = ("vlfeedback", "human_preference", "rlhf_v")


COLUMNS = {
    column.key: column
    for column in (
        Column("chair.CHAIR_S", "CHAIR", "low", 1, "S"),
        Column("chair.CHAIR_I", "CHAIR", "low", 1, "I"),
        Column("pope.f1", "POPE", "high", 2),
        Column("mmhal.score", "MMHal", "high", 2),
        Column("science_qa.img_accuracy", "SciQA-IMG", "high", 1),
        Column("mm_vet.total", "MM-Vet", "high", 1),
        Column("mmbench.accuracy", "MMBench", "high", 1),
        Column("llava_bench.overall", "LLaVA-Bench", "high", 1),
        Column("chair.coverage", "coverage", None, 1),
        Column("chair.words", "words", None, 1),
        Column("pope.yes_ratio", "yes %", None, 1),
        Column("rank.hallucination", "rank, hall.", "low", 2),
        Column("rank.comprehensive", "rank, compr.", "low", 2),
    )
}
BREAKDOWN = tuple(
    Column(key, title, "high", 1)
    for key, title in zip(paper.BREAKDOWN, ("Convo", "Captioning", "Reasoning", "Overall"))
)
BESIDE = ("chair.coverage", "chair.words", "pope.yes_ratio")  # explain a score; the paper prints none of them

OWN_WORDS = "‡"
OWN_WORDS_MEANS = "the judge was asked in our wording of the prompt, not in the official one"


@dataclass
class Cell:
    """One score of one row. ``place`` is 1 for the best in its column, 2 for the second best. ``notes``: footnotes.

    ``own_words``: a judge gave it who was asked in our wording, which OWN_WORDS marks wherever it is shown.
    """

    summary: Summary
    place: int = 0
    notes: list[str] = field(default_factory=list)
    difference: bool = False
    own_words: bool = False

    def text(self, decimals: int) -> str:
        if self.summary.mean is None:
            return "–"
        error = self.summary.se if self.difference else self.summary.sd
        spread = "" if math.isnan(error) else f" ± {error:.{decimals}f}"
        number = f"{self.summary.mean:{'+' if self.difference else ''}.{decimals}f}"
        return number.replace("-", "−") + spread + (OWN_WORDS if self.own_words else "")


@dataclass
class Line:
    """One line, of the row ``name``: ``lead`` holds the cells before the scores, ``says_less`` a warning or ""."""

    name: str
    kind: Literal["ours", "paper", "control", "difference"]
    lead: tuple[str, ...]
    cells: dict[str, Cell]
    notes: list[str] = field(default_factory=list)
    says_less: str = ""


@dataclass
class Block:
    """Lines that may be compared with each other; ``warnings`` state what they must not be compared with."""

    title: str
    lines: list[Line]
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class Table:
    number: int
    title: str
    lead: tuple[str, ...]
    columns: tuple[Column, ...]
    blocks: list[Block]
    notes: list[str]


def table(number: int, runs: Sequence[Run]) -> Table | None:
    """Make Table ``number`` (1 to 4) from ``runs``; None if no run belongs to it.

    Runs whose benchmarks were limited were asked other questions and stand in blocks of their own, one for each limit.
    """
    make: Callable[[Sequence[Run]], Table | None] = {1: _table_1, 2: _table_2, 3: _table_3, 4: _table_4}[number]
    parts = []
    for limit in sorted({run.limit for run in runs}):
        alike = [run for run in runs if run.limit == limit]
        if (part := make(alike)) is not None:
            parts.append(_marked(part, limit, alike) if limit else part)
    if not parts:
        return None
    columns = {column.key: column for part in parts for column in part.columns}
    blocks = [block for part in parts for block in part.blocks]
    for line in (line for block in blocks for line in block.lines):
        line.cells = {key: line.cells.get(key, Cell(Summary(None))) for key in columns}
    notes = list(dict.fromkeys(note for part in parts for note in part.notes))
    return replace(parts[0], columns=tuple(columns.values()), blocks=blocks, notes=notes)


def _marked(table: Table, limit: str, runs: Sequence[Run]) -> Table:
    """A table of runs under a limit, which every block and every row of ours says."""
    asked = {f"{name} {one['asked']} of {one['of']}": None for run in runs for name, one in run.limits.items()}
    warning = (
        f"A quick look ({limit}): questions asked are {', '.join(asked)}, so these scores can be compared neither with "
        "rows without this limit nor with the paper's."
    )
    for block in table.blocks:
        block.title = f"{block.title}, {limit}" if block.title else limit
        block.warnings.append(warning)
        for line in block.lines:
            if line.kind != "paper":
                line.lead = (*line.lead[:-1], f"{line.lead[-1]}, {limit}")
    return table


def row_of(run: Run) -> list[tuple[Column, Cell]]:
    """The scores of a single run, as Table 3 shows them; without the columns that it has no score for."""
    found = table(3, [run])
    line = next(line for block in found.blocks for line in block.lines if line.kind in ("ours", "control"))
    return [(column, cell) for column in found.columns if (cell := line.cells[column.key]).summary.mean is not None]


def all_columns(runs: Iterable[Run]) -> tuple[Column, ...]:
    """The columns of Tables 1 and 3: the paper's, BESIDE, and those of further benchmarks that ``runs`` answered."""
    known = {column.key for column in (*COLUMNS.values(), *BREAKDOWN)}
    further = {column.key: column for run in runs for column in run.columns if column.key not in known}
    return (*(COLUMNS[key] for key in paper.EIGHT + BESIDE), *further.values())


# Table 3: the ablation ------------------------------------------------------------------------------------------------

MARKS = {"none": ("✗", "✗"), "text": ("✓", "✗"), "noise": ("✗", "✓"), "both": ("✓", "✓")}


def _table_3(runs: Sequence[Run]) -> Table:
    blocks = []
    rows = group(runs)
    every = sorted({row.world for row in rows})
    # A base model alone belongs to Table 2, and other preference data to Table 1: without other runs, they are shown
    # here.
    trained = [
        world
        for world in every
        if world[1] not in OTHER_DATA and any(row.world == world and row.name != "none" for row in rows)
    ]
    worlds = trained or [world for world in every if world[1] not in OTHER_DATA] or every
    elsewhere = "; ".join(f"{model}, {data}" for model, data in every if (model, data) not in worlds)
    omitted = [f"omitted (model, data): {elsewhere}; see Tables 1 and 2"] if elsewhere else []
    columns = all_columns(run for run in runs if run.world in worlds)
    for world in worlds:
        here = [row for row in rows if row.world == world]
        bases = _bases(here)
        main = [row for row in here if row.name in PAPER_ROWS and row.whole]
        lines = [(row, _ours(row, columns, MARKS[row.name], bases)) for row in main]
        _rank([line for _, line in lines], columns)
        printed = _paper_lines(paper.TABLE_3, columns, lambda row: MARKS[row.key])
        shown: list[Line] = []
        for name in PAPER_ROWS:
            shown += [line for row, line in lines if row.name == name] + [printed[name]]
        title = f"model {world[0]}, data {world[1]}"
        blocks.append(Block(title, shown, _comparable(here) + _no_base(bases), _order(lines)))
        others = [row for row in here if row not in main]
        if others:
            controls = [_ours(row, columns, ("", ""), bases, kind="control") for row in others]
            blocks.append(Block(f"controls, beyond the paper (not ranked): {title}", controls))
        blocks += _differences(here, columns, title)
    return Table(
        3,
        "Ablation: which dispreferences",
        ("Text disprefer", "Image distortion", "row"),
        columns,
        blocks,
        _general(3) + omitted,
    )


def _comparable(rows: Sequence[Row]) -> list[str]:
    model, data = rows[0].world
    if any(run.painted for row in rows for run in row.runs):
        return [
            f"These numbers come from the embedded world (data={data}, model={model}): painted pictures, described "
            "in a small vocabulary of their own. Their level cannot be compared with the paper's rows, which "
            "are LLaVA-1.5-7B on COCO; only the order of the rows can."
        ]
    if model != REAL or data != "povid_17k":
        return [
            f"The paper's rows are LLaVA-1.5-7B trained on POVID's 17k records (model={REAL}, data=povid_17k); "
            f"these are model={model}, data={data}, so their level cannot be compared with them."
        ]
    return []


def _differences(rows: list[Row], columns: Sequence[Column], title: str) -> list[Block]:
    """Every row minus the base, and minus the control that is fine-tuned on the preferred responses alone.

    The standard error of a difference is the root of the sum of both rows' squared standard errors; for rows over
    several worlds, that of the differences within each world, since both rows share its pictures. A row is marked as
    better if the difference exceeds two of its standard errors.
    """
    blocks = []
    bases = _bases(rows)
    over = "worlds, each world by itself" if all(len(row.by_world()) > 1 for row in rows) else "seeds"
    for name in ("none", "preferred_only"):
        candidates = [row for row in rows if row.name == name and row.whole]
        lines = []
        for row in (row for row in rows if candidates and row not in candidates and row not in bases):
            warning, against = _says_less(row, bases), nearest(row, candidates)
            cells = {column.key: _difference(row, against, column, bool(warning)) for column in columns}
            if any(cell.summary.mean is not None for cell in cells.values()):
                lead = (*MARKS.get(row.name, ("", "")), f"{row.label} − {against.label}")
                lines.append(Line(row.name, "difference", lead, cells, says_less=warning))
        if lines:
            blocks.append(
                Block(
                    f"difference from {name} ± its standard error over {over} (bold: better by more than "
                    f"two standard errors): {title}",
                    lines,
                )
            )
    return blocks


def _difference(row: Row, against: Row, column: Column, says_less: bool) -> Cell:
    own, other = summarise(row, column.key), summarise(against, column.key)
    if own.mean is None or other.mean is None:
        return Cell(Summary(None))
    gap, error = own.mean - other.mean, math.hypot(own.se, other.se)
    if (within := _within_worlds(row, against, column.key)) is not None:
        gap, error = within
    better = {"low": -gap, "high": gap, None: -math.inf}[column.better]
    # the error of a single run is NaN, which compares false, so one run is never shown to be better
    won = better > 2 * error and not (says_less and column.key in CHAIR)
    return Cell(Summary(gap, se=error, n=min(own.n, other.n)), place=int(won), difference=True)


def _within_worlds(row: Row, against: Row, key: str) -> tuple[float, float] | None:
    """The mean of the differences within each world, and its standard error; None unless both share several worlds."""
    own, other = row.by_world(), against.by_world()
    if len(own) < 2 or own.keys() != other.keys():
        return None
    pairs = [(summarise(own[world], key).mean, summarise(other[world], key).mean) for world in own]
    gaps = [mine - theirs for mine, theirs in pairs if mine is not None and theirs is not None]
    if len(gaps) < len(pairs):
        return None
    mean = math.fsum(gaps) / len(gaps)
    return mean, math.sqrt(math.fsum((gap - mean) ** 2 for gap in gaps) / (len(gaps) - 1) / len(gaps))


def _order(lines: list[tuple[Row, Line]]) -> list[str]:
    """Sentences on the order of the four rows in CHAIR, ours and the paper's, if each of ours appears exactly once."""
    if sorted(row.name for row, _ in lines) != sorted(PAPER_ROWS):
        return []
    sentences = []
    for key in CHAIR:
        ours = {row.name + " †" * bool(line.says_less): line.cells[key].summary.mean for row, line in lines}
        if None in ours.values():
            continue
        printed = {row.key: row.scores[key] for row in paper.TABLE_3}
        sentences.append(
            f"{COLUMNS[key].heading.split()[0]}, from worst to best: ours {_descending(ours)}; "
            f"paper {_descending(printed)}."
        )
    return sentences


def _descending(scores: dict[str, float]) -> str:
    return " > ".join(sorted(scores, key=lambda name: -scores[name]))


def _bases(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row.name == "none" and row.whole]


def _no_base(bases: list[Row]) -> list[str]:
    if bases:
        return []
    return [
        "No base row (ablation=none) for this model and data, so rows that say less than the base could not be found."
    ]


# Tables 1 and 4: preference data sets ---------------------------------------------------------------------------------


def _table_1(runs: Sequence[Run]) -> Table | None:
    columns = all_columns(run for run in runs if _in_table_1(run))
    return _by_data(1, "Preference data sets", paper.TABLE_1, columns, runs)


def _table_4(runs: Sequence[Run]) -> Table | None:
    asked = [run for run in runs if "llava_bench" in run.benchmarks]
    return _by_data(4, "LLaVA-Bench in its three categories", paper.TABLE_4, BREAKDOWN, asked)


def _by_data(
    number: int, title: str, printed: Sequence[PaperRow], columns: tuple[Column, ...], runs: Sequence[Run]
) -> Table | None:
    belongs = [run for run in runs if _in_table_1(run)]
    models = sorted({run.world[0] for run in belongs if run.row != "none" or run.world[0] == REAL})
    blocks = []
    for model in models:
        here = [run for run in belongs if run.world[0] == model]
        # the scores of the base model do not depend on the data set of its run, on which it was not trained
        rows = group((run for run in here if run.row == "none"), ignore=("data",))
        rows += group(run for run in here if run.row != "none")
        bases = _bases(rows)
        paper_lines = _paper_lines(printed, columns, lambda row: (row.name,))
        lines = [(row, _ours(row, columns, (paper_lines[_data_row(row.runs[0])].lead[0],), bases)) for row in rows]
        _rank([line for _, line in lines], columns)
        shown: list[Line] = []
        for paper_row in printed:
            shown += [line for row, line in lines if _data_row(row.runs[0]) == paper_row.key] + [
                paper_lines[paper_row.key]
            ]
        warnings = (
            []
            if model == REAL
            else [
                f"The paper's rows are LLaVA-1.5-7B; these are model={model}, so their "
                "level cannot be compared with them."
            ]
        )
        blocks.append(Block(f"model {model}", shown, warnings + _no_base(bases)))
    return Table(number, title, ("Method", "row"), columns, blocks, _general(number)) if blocks else None


def _in_table_1(run: Run) -> bool:
    return not run.painted and _data_row(run) is not None


def _data_row(run: Run) -> str | None:
    """The row of Tables 1 and 4 that a run belongs to: the base, full POVID or another preference data set."""
    if run.row not in PAPER_ROWS or "stage" in run.settings or "adapters" in run.settings:
        return None
    if run.row == "none":
        return "none"
    data = run.world[1]
    if data == "povid_17k":
        return "povid" if run.row == "both" else None
    return data if data in OTHER_DATA else None


# Table 2: models ------------------------------------------------------------------------------------------------------


def _table_2(runs: Sequence[Run]) -> Table | None:
    ranks = ("rank.hallucination", "rank.comprehensive")
    keys = paper.HALLUCINATION + ranks[:1] + paper.COMPREHENSIVE + ranks[1:]
    columns = tuple(COLUMNS[key] for key in keys)
    belongs = [
        run
        for run in runs
        if not run.painted
        and "scenes" not in run.world[0]
        and (_data_row(run) == "none" or (_data_row(run) == "povid" and run.world[0] == REAL))
    ]
    if not belongs:
        return None
    rows = group((run for run in belongs if run.row == "none"), ignore=("data",))
    rows += group(run for run in belongs if run.row != "none")
    paper_lines = _paper_lines(paper.TABLE_2, columns, lambda row: (row.name, row.vision, row.language))
    parts = {row.key: (row.name, row.vision, row.language) for row in paper.TABLE_2}
    lines = [
        (
            _model_row(row),
            _ours(
                row,
                columns,
                parts.get(_model_row(row), (row.world[0], "", "")),
                [base for base in _bases(rows) if base.world[0] == row.world[0]],
            ),
        )
        for row in rows
    ]
    _average_ranks([line for _, line in lines])
    _average_ranks(list(paper_lines.values()))
    for paper_row in paper.TABLE_2:
        for key, printed in zip(ranks, paper_row.ranks or ()):
            cell = paper_lines[paper_row.key].cells[key]
            if printed is not None and cell.summary.mean is not None and round(cell.summary.mean, 2) != printed:
                cell.notes.append(
                    f"paper, Table 2 prints {printed:.2f} for {paper_row.name}; "
                    f"its own scores give {cell.summary.mean:.2f}"
                )
    for members in ([line for _, line in lines], list(paper_lines.values())):
        _rank(members, columns)
    shown: list[Line] = []
    for paper_row in paper.TABLE_2:
        shown += [line for key, line in lines if key == paper_row.key] + [paper_lines[paper_row.key]]
    shown += [line for key, line in lines if key not in paper_lines]
    return Table(
        2,
        "Vision-language models",
        ("Method", "Vision encoder", "Language model", "row"),
        columns,
        [Block("", shown)],
        _general(2),
    )


def _model_row(row: Row) -> str:
    if row.name != "none":
        return "povid"
    plain = "".join(letter for letter in row.world[0].lower() if letter.isalnum())
    for key in ("instructblip", "qwen_vl_chat", "mplug_owl2"):
        if key.replace("_", "") in plain:
            return key
    return row.world[0]


def _average_ranks(lines: Sequence[Line]) -> None:
    """Mean rank over four benchmarks among the rows that have all four; ties get the mean of their ranks."""
    for name, keys in (("rank.hallucination", paper.HALLUCINATION), ("rank.comprehensive", paper.COMPREHENSIVE)):
        whole = [line for line in lines if all(line.cells[key].summary.mean is not None for key in keys)]
        for line in lines:
            reason = "average rank: only rows with all four scores are ranked"
            line.cells[name] = Cell(Summary(None, reason=reason), notes=[reason])
        if len(whole) < 2:
            continue
        for line in whole:
            places = []
            for key in keys:
                values = [_shown(other.cells[key], COLUMNS[key]) for other in whole]
                mine = _shown(line.cells[key], COLUMNS[key])
                better = sum(value < mine if COLUMNS[key].better == "low" else value > mine for value in values)
                places.append(better + (values.count(mine) + 1) / 2)
            line.cells[name] = Cell(Summary(math.fsum(places) / len(places), n=1))


# Lines ----------------------------------------------------------------------------------------------------------------


def _ours(
    row: Row,
    columns: Iterable[Column],
    lead: tuple[str, ...],
    bases: list[Row],
    kind: Literal["ours", "control"] = "ours",
) -> Line:
    cells = {}
    for column in columns:
        summary = summarise(row, column.key)
        notes = [note for note in (summary.reason, summary.remark) if note]
        judges = _judges(row, column, summary)
        notes += _corrected(row, column, summary) + _explained(row, column, summary) + _judged(column, judges)
        own_words = any(judge["wording"] != "official" for judge in judges)
        cells[column.key] = Cell(summary, notes=notes, own_words=own_words)
    seeds = f"n = {len(row.runs)}"
    remarks = [f"{row.name}: {remark}" for remark in row.remarks]
    return Line(row.name, kind, (*lead, f"{row.label}, {seeds}"), cells, remarks, _says_less(row, bases))


def _corrected(row: Row, column: Column, summary: Summary) -> list[str]:
    """The score under the corrected rule, where the official rule is a plain mistake, if it differs as shown."""
    if summary.mean is None or column.better is None:
        return []
    benchmark = column.key.partition(".")[0]
    corrected = summarise(row, column.key, corrected=True)
    if corrected.mean is None or f"{corrected.mean:.{column.decimals}f}" == f"{summary.mean:.{column.decimals}f}":
        return []
    return [f"{benchmark}: official rule; corrected {corrected.mean:.{column.decimals}f}"]


def _explained(row: Row, column: Column, summary: Summary) -> list[str]:
    """What stands behind a score in results.json: more than a few invalid answers, or objects repeated in captions."""
    benchmark, _, key = column.key.partition(".")
    if summary.mean is None:
        return []
    notes = []
    invalid, others = summarise(row, f"{benchmark}.invalid").mean, summarise(row, f"{column.key}_valid").mean
    if invalid is not None and others is not None and invalid > FEW:
        notes.append(
            f"{benchmark}: {invalid:.1f} % of the answers say neither yes nor no; {key} of the others is "
            f"{others:.{column.decimals}f}"
        )
    distinct, repeats = summarise(row, f"{column.key}_distinct").mean, summarise(row, f"{benchmark}.repeat_rate").mean
    if distinct is not None and repeats is not None and abs(distinct - summary.mean) > FEW:
        notes.append(
            f"{benchmark}: {repeats:.1f} % of the mentions repeat an object of their caption; {key} over distinct "
            f"objects is {distinct:.{column.decimals}f}"
        )
    return notes


def _judges(row: Row, column: Column, summary: Summary) -> list[dict[str, Any]]:
    """The judges behind a score, as results.json describes them."""
    name = column.key.partition(".")[0]
    found = [lookup(run.results["benchmarks"], f"{name}.judge") for run in row.runs if summary.mean is not None]
    return [judge for judge in found if isinstance(judge, dict) and judge.get("wording")]


def _judged(column: Column, judges: Sequence[dict[str, Any]]) -> list[str]:
    """Who judged a score, and whether asked in the official words or in ours."""
    name = column.key.partition(".")[0]
    return sorted(
        f"{name}: judged by {model}{f' at revision {revision}' if revision else ''} (officially {official}), "
        + ("the official prompt" if wording == "official" else f"the prompt in our own wording ({wording})")
        for model, revision, official, wording in {
            tuple(judge.get(key) for key in ("model", "revision", "official_model", "wording")) for judge in judges
        }
    )


def _says_less(row: Row, bases: list[Row]) -> str:
    """The warning that a row mentions fewer of the true objects than the base by more than COLLAPSE points, or ""."""
    if row in bases or not bases:
        return ""
    base = nearest(row, bases)
    before, after = summarise(base, "chair.coverage"), summarise(row, "chair.coverage")
    if before.mean is None or after.mean is None or before.mean - after.mean <= COLLAPSE:
        return ""
    return (
        f"{row.label} says less: coverage fell by "
        f"{before.mean - after.mean:.1f} points (from {before.mean:.1f} to {after.mean:.1f}), so a lower CHAIR is not "
        "an improvement by itself and is not ranked"
    )


def nearest(row: Row, candidates: list[Row]) -> Row:
    """The candidate trained for as many steps, if any, that shares the most settings with ``row``."""
    return max(
        candidates,
        key=lambda other: (
            other.steps == row.steps,
            sum(other.settings.get(key) == value for key, value in row.settings.items()),
        ),
    )


def _paper_lines(
    rows: Sequence[PaperRow], columns: Sequence[Column], lead: Callable[[PaperRow], tuple[str, ...]]
) -> dict[str, Line]:
    lines = {}
    for row in rows:
        cells = {}
        for column in columns:
            value = row.scores.get(column.key)
            remark = row.remarks.get(column.key)
            cells[column.key] = Cell(Summary(value), notes=[remark] if remark else [])
        notes = [row.remarks[""]] if "" in row.remarks else []
        lines[row.key] = Line(row.key, "paper", (*lead(row), f"paper, Table {row.table}"), cells, notes)
    _rank(list(lines.values()), columns)
    return lines


def _shown(cell: Cell, column: Column) -> float:
    return round(cell.summary.mean, column.decimals)


def _rank(lines: Sequence[Line], columns: Iterable[Column]) -> None:
    """Mark best and second best by the value as shown; ties share a place. A row that says less is not ranked in CHAIR.

    Nothing is marked if all values are equal, and no second best if there are only two values.
    """
    for column in columns:
        if column.better is None:
            continue
        contest = [
            line
            for line in lines
            if line.cells[column.key].summary.mean is not None and not (line.says_less and column.key in CHAIR)
        ]
        values = [_shown(line.cells[column.key], column) for line in contest]
        ladder = sorted(set(values), reverse=column.better == "high")
        if len(ladder) < 2:
            continue
        for line, value in zip(contest, values):
            place = ladder.index(value) + 1
            line.cells[column.key] = replace(
                line.cells[column.key], place=place if place == 1 or place == 2 < len(values) else 0
            )


def _general(number: int) -> list[str]:
    return [
        "ours: mean ± standard deviation over n seeds; by the mean as shown, bold is best and underlined second best, "
        "among our rows and among the paper's; within one world, the spread leaves out the sampling of the pictures",
        *(
            (
                "coverage: share of the true objects that the captions mention; words: mean length of a caption; "
                "yes %: share of yes among the POPE answers; the paper reports none of them",
            )
            if number in (1, 3)
            else ()
        ),
        *paper.GENERAL[number],
    ]
