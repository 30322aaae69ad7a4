"""One self-contained page of all runs below a folder: tables, figures, curves, samples, configurations.

Everything that a run folder holds is optional but its results.json: what is missing or damaged is named on the page.
Tables count every run; curves, samples and configurations are those of the ``MOST_RUNS`` newest.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from povid import pages
from povid.fault import Fault
from povid.report import curves, figures, samples
from povid.report.render import Notes
from povid.report.runs import Row, Run, find_runs, group, is_number
from povid.report.tables import Table, table

MOST_RUNS = 200
MOST_FIGURES = 40
MOST_FIGURE_BYTES = 2 * 2**20
MOST_NOTE_BYTES = 8 * 2**20
MOST_TEXT = 200_000  # letters of a configuration
MOST_CAPTIONS = 5_000
LISTED = 20  # sentences of one kind under "What is missing"


def write_page(outputs: Path, out: Path | None = None) -> Path:
    """Write the page of all runs below ``outputs`` to ``out`` (default ``outputs/report.html``); return the file.

    Raises:
        Fault: no readable run below ``outputs``, or ``out`` cannot be written.
    """
    outputs = Path(outputs)
    skipped: list[str] = []
    runs = find_runs(outputs, skipped)
    out = Path(out) if out else outputs / "report.html"
    rows = group(runs)
    several = len({row.world for row in rows}) > 1
    places = [[*(row.world if several else ()), *([row.limit] if row.limit else ())] for row in rows]
    labels = [f"{row.label} ({', '.join(place)})" if place else row.label for row, place in zip(rows, places)]
    counted = sorted((run for row in rows for run in row.runs), key=lambda run: run.started, reverse=True)
    shown = counted[:MOST_RUNS]
    missing = [*_unread(skipped, outputs), *_unfinished(outputs, runs), *_earlier(rows, outputs)]
    if len(counted) > len(shown):
        missing.append(
            f"Curves, samples and configurations are those of the newest {len(shown):,} of {len(counted):,} runs; the "
            "tables count all of them."
        )
    unread: list[str] = []
    named = list(zip(rows, labels, figures.colors(rows)))
    drawn = curves.curves(named, shown, unread, outputs)
    cards = _cards(rows, labels, shown, unread, outputs)
    names = {run.file: f"{label}, seed {run.seed}" for row, label in zip(rows, labels) for run in row.runs}
    drawings = _figures(runs, names, unread, outputs)
    missing += _first(unread)
    tables = [_view(found) for number in (3, 1, 2, 4) if (found := table(number, runs))]
    sections = [
        *([("missing", "What is missing")] if missing else []),
        *((f"table{one['table'].number}", f"Table {one['table'].number}") for one in tables),
        *([("figures", "Figures")] if drawings.of_all or drawings.of_one else []),
        *([("training", "Training")] if drawn else []),
        *([("samples", "Samples")] if cards else []),
        ("runs", "Runs"),
    ]
    try:
        return pages.write(
            out,
            "report.html",
            scripts=("samples.js", "curves.js"),
            library=curves.library() if drawn else None,
            title=f"Runs below {outputs.resolve().name}",
            facts=f"{len(counted):,} {'run' if len(counted) == 1 else 'runs'} in {len(rows):,} "
            f"{'row' if len(rows) == 1 else 'rows'} below {outputs.resolve()}; written by povid {version('povid')} on "
            f"{datetime.now().astimezone():%Y-%m-%d at %H:%M %Z}",
            sections=sections,
            missing=missing,
            tables=tables,
            figures=drawings,
            curves=drawn,
            cards=cards,
            sample_rows=[(number, label) for number, label in enumerate(labels)],
            runs=[
                _details(run, label, outputs, whole=run in shown)
                for row, label in zip(rows, labels)
                for run in row.runs
            ],
        )
    except OSError as error:
        raise Fault(f"{out} cannot be written ({error.strerror or error}); free space or name another file") from error


def _view(found: Table) -> dict[str, Any]:
    """A table for the template; ``filled``: the columns in which a row of ours has a score.

    The other columns, and the footnotes in ``hidden`` that belong to them alone, are shown on request.
    """
    lines = [line for block in found.blocks for line in block.lines]
    ours = [line for line in lines if line.kind != "paper"]
    filled = {
        column.key for column in found.columns if any(line.cells[column.key].summary.mean is not None for line in ours)
    }
    notes = Notes(found)
    seen = {
        note for line in lines for note in (*line.notes, *(text for key in filled for text in line.cells[key].notes))
    }
    return {
        "table": found,
        "notes": notes,
        "filled": filled,
        "hidden": set(notes.lettered) - seen,
        "hides": len(filled) < len(found.columns),
    }


def _first(sentences: Sequence[str]) -> list[str]:
    """The first ``LISTED`` sentences, and how many more there are."""
    more = len(sentences) - LISTED
    return [*sentences[:LISTED], *([f"… and {more:,} more of this kind."] if more > 0 else [])]


def _unread(skipped: Sequence[str], outputs: Path) -> list[str]:
    return _first([f"Not counted: {sentence.replace(f'{outputs}/', '')}" for sentence in skipped])


def _unfinished(outputs: Path, runs: Sequence[Run]) -> list[str]:
    """A sentence on every folder of a run that has begun and has no results.json."""
    found = []
    for folder in sorted(file.parent for file in outputs.rglob("packages.txt")):
        if (folder / "results.json").exists():
            continue
        reached = "no stage has begun"
        for stage in sorted(folder.glob("stage_*")):
            steps = [points[-1][0] for points in curves.metrics(stage)[0].values()]
            reached = f"{stage.name.replace('_', ' ')}, " + (f"step {max(steps):.0f}" if steps else "nothing logged")
        found.append(f"Not finished, so in no table: {folder.relative_to(outputs)} ({reached}).")
    return _first(found)


def _earlier(rows: Sequence[Row], outputs: Path) -> list[str]:
    old = [run for row in rows for run in row.runs if not isinstance(run.results.get("identity"), dict)]
    return _first(
        [
            f"Of an earlier version, told apart by its recorded settings alone: {run.folder.relative_to(outputs)}."
            for run in old
        ]
    )


def _cards(
    rows: Sequence[Row], labels: Sequence[str], shown: Sequence[Run], missing: list[str], outputs: Path
) -> list[samples.Card]:
    found, without, captions, omitted = [], 0, 0, 0
    chosen = {run.file for run in shown}
    for number, (row, label) in enumerate(zip(rows, labels)):
        for run in (run for run in row.runs if run.file in chosen):
            try:
                kept = samples.read(run.folder)
            except Fault as fault:
                missing.append(str(fault).replace(f"{outputs}/", ""))
                continue
            without += not kept
            left = MOST_CAPTIONS - captions
            if len(kept) > left:
                omitted += len(kept) - left
            kept = kept[:left]
            captions += len(kept)
            found.append((number, label, f"seed {run.seed}", row.world, kept))
    if without:
        missing.append(
            f"{without:,} of {len(shown):,} runs have no samples (samples=0, or a run of an earlier version)."
        )
    if omitted:
        missing.append(f"{omitted:,} captions are not shown: the page holds {MOST_CAPTIONS:,} already.")
    return samples.cards(found)


@dataclass
class _Figures:
    """(address, caption) of figures of all runs, and of single ones."""

    of_all: list[tuple[str, str]]
    of_one: list[tuple[str, str]]


def _figures(runs: Sequence[Run], labels: Mapping[Path, str], missing: list[str], outputs: Path) -> _Figures:
    """Hallucination against coverage, and every figure of an analysis whose JSON names runs of ``labels`` alone."""
    found = _Figures([], [])
    with tempfile.TemporaryDirectory() as folder:
        drawn = figures.chair_against_coverage(runs, Path(folder) / "figure.png")
        if drawn:
            caption = "Hallucination against coverage. Small dots are seeds; bars are standard errors."
            found.of_all.append((pages.address(drawn.read_bytes()), caption))
    identities = {_digest(run): run for run in runs if run.file in labels and _digest(run)}
    for file in sorted(outputs.rglob("analysis/*.png")):
        place = file.relative_to(outputs)
        label = labels.get(file.parents[1] / "results.json")
        caption, named = _note(file.with_suffix(".json"))
        if file.is_symlink() or (encoded := _png(file)) is None:
            missing.append(f"{place} is not a PNG of at most {MOST_FIGURE_BYTES:,} bytes and is not shown")
        elif not named or not named <= identities.keys() or (label and len(named) > 1):
            missing.append(f"{place} is not shown: its JSON does not name a run that is on this page as it is now")
        elif label and identities[named.copy().pop()].folder != file.parents[1]:
            missing.append(f"{place} is not shown: it belongs to another run")
        elif len(found.of_all) + len(found.of_one) >= MOST_FIGURES:
            missing.append(f"{place} is not shown: the page holds {MOST_FIGURES} figures already")
        elif label:
            found.of_one.append((pages.address(encoded), f"{label}: {caption}"))
        else:
            found.of_all.append((pages.address(encoded), caption))
    return found


def _png(file: Path) -> bytes | None:
    with file.open("rb") as handle:
        encoded = handle.read(MOST_FIGURE_BYTES + 1)
    return encoded if len(encoded) <= MOST_FIGURE_BYTES and pages.kind(encoded) == "png" else None


def _note(file: Path) -> tuple[str, set[str]]:
    """The caption of an analysis, and the identities of the runs that it was made of; none if the JSON is damaged."""
    try:
        if file.stat().st_size > MOST_NOTE_BYTES:
            return file.stem, set()
        note = json.loads(file.read_text(encoding="utf-8"))
        return str(note.get("caption") or file.stem)[:4000], set(_named(note))
    except (OSError, ValueError, AttributeError, RecursionError):
        return file.stem, set()


def _named(note: Any) -> Iterator[str]:
    """Every digest that stands beside a row and a seed, at any depth."""
    if isinstance(note, dict):
        if {"digest", "row", "seed"} <= note.keys():
            yield str(note["digest"])
        for value in note.values():
            yield from _named(value)
    elif isinstance(note, list):
        for value in note:
            yield from _named(value)


def _digest(run: Run) -> str | None:
    identity = run.results.get("identity")
    return identity.get("digest") if isinstance(identity, dict) else None


def _details(run: Run, label: str, outputs: Path, whole: bool) -> dict[str, Any]:
    """A line of the list of runs; without ``whole``, its configuration and versions are left out."""
    results = run.results
    stages, timings = results.get("stages"), results.get("timings")
    steps = (
        [stage.get("steps") for stage in stages.values() if isinstance(stage, dict)] if isinstance(stages, dict) else []
    )
    seconds = [value for value in timings.values() if is_number(value)] if isinstance(timings, dict) else []
    texts = []
    if whole:
        try:
            with (run.folder / "config.yaml").open(encoding="utf-8", errors="replace") as file:
                texts.append(("config.yaml", file.read(MOST_TEXT)))
        except OSError as error:
            texts.append(("config.yaml", f"cannot be read ({error.strerror})"))
        versions = results.get("versions")
        found = versions.items() if isinstance(versions, dict) else ()
        texts.append(("versions", "\n".join(f"{name} {text}" for name, text in found) or "not recorded"))
    return {
        "label": label,
        "seed": run.seed,
        "started": run.started[:16].replace("T", " "),
        "steps": f"{sum(count for count in steps if is_number(count)):,} steps",
        "minutes": f"{sum(seconds) / 60:.1f} min" if seconds else "",
        "folder": str(run.folder.relative_to(outputs)),
        "identity": _digest(run),
        "texts": texts,
    }
