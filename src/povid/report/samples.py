"""Samples of a run: pictures, responses and captions before and after training, kept in ``RUN/samples``.

``samples.json`` holds texts with the places of their hallucinated words, so that a page can mark them without the
benchmark's files; pictures lie beside it. A run folder may come from anywhere: what is read from it is bounded in size,
and a picture has to lie in ``samples`` itself.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from povid import pages
from povid.fault import Fault
from povid.files import draft, write_json
from povid.report.dashboards import TEXTS, Finder, hallucinated, opened, spans

FOLDER, FILE = "samples", "samples.json"
MOST_SAMPLES = 500
MOST_BYTES = 16 * 2**20  # of samples.json
MOST_LETTERS = 20_000  # of one text
MOST_PICTURE_BYTES = 2 * 2**20
NOISED_SHOWN = 4  # noised pictures on a card; each seed draws its own noise
CURE = "restore it from a copy of the run folder"

Pieces = list[tuple[str, str]]
"""A text in pieces with their marks: "bad" for an object that is not in the picture, "other", or ""."""


def write(run: Path, records: Sequence[Mapping[str, Any]], find: Finder | None = None) -> Path:
    """Write the samples of a run folder; return its ``samples.json``.

    ``records`` are those of :func:`povid.report.dashboards.table_rows`. Pictures are scaled down for a page. Without
    ``find``, or without the ``objects`` of a record, nothing is known about its hallucinations.
    """
    made = []
    with draft(run / FOLDER) as folder:
        folder.mkdir()
        for number, record in enumerate(records):
            truth = record.get("objects")
            known = find is not None and truth is not None
            sample: dict[str, Any] = {"id": str(record.get("id", "")), "question": str(record.get("question") or "")}
            for key in TEXTS:
                text = str(record.get(key) or "")
                sample[key] = {"text": text}
                if known:
                    absent = hallucinated(text, truth, find)
                    sample[key] |= {
                        "marks": [list(span) for span in spans(text, truth, find)],
                        "hallucinated": absent,
                        "true": sorted(set(find(text)) - set(absent)),
                    }
            noise = record.get("noise")
            sample["noise"] = None if noise is None else [[str(text), bool(differs)] for text, differs in noise]
            sample["objects"] = sorted(truth) if truth is not None else None
            for key, name in (("picture", "image"), ("noised", "noised")):
                sample[key] = None
                if record.get(name) is not None:
                    encoded = pages.picture(opened(record[name]))
                    sample[key] = f"{number}_{key}.{pages.kind(encoded)}"
                    (folder / sample[key]).write_bytes(encoded)
            made.append(sample)
        write_json(folder / FILE, {"samples": made})
    return run / FOLDER / FILE


@dataclass(frozen=True)
class Text:
    """A text; ``marks`` and the objects named in it are None where the picture's objects are not known."""

    text: str
    marks: tuple[tuple[int, int], ...] | None = None
    hallucinated: tuple[str, ...] | None = None
    true: tuple[str, ...] | None = None

    @property
    def pieces(self) -> Pieces:
        found, end = [], 0
        for start, stop in self.marks or ():
            found += [(self.text[end:start], ""), (self.text[start:stop], "bad")]
            end = stop
        return [piece for piece in [*found, (self.text[end:], "")] if piece[0]]


@dataclass(frozen=True)
class Sample:
    """One record of ``samples.json``.

    ``noise``: y_l^n, what the model says token by token of the noised picture; a piece that differs from y_w is marked.
    A picture is its encoded bytes, or None, and then ``gone`` may say why.
    """

    id: str
    question: str
    preferred: Text
    dispreferred: Text
    before: Text
    after: Text
    objects: tuple[str, ...] | None
    noise: Pieces | None
    picture: bytes | None
    noised: bytes | None
    gone: tuple[str, ...]


def read(run: Path) -> list[Sample]:
    """The samples of a run folder; none if it has no ``samples.json``.

    Raises:
        Fault: the file is damaged or larger than ``MOST_BYTES``.
    """
    file = run / FOLDER / FILE
    if not file.is_file():
        return []
    if (size := file.stat().st_size) > MOST_BYTES:
        raise Fault(f"{file} has {size:,} bytes, more than the {MOST_BYTES:,} of any run's samples; {CURE}")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["samples"]
        return [_sample(run / FOLDER, record) for record in found[:MOST_SAMPLES]]
    except OSError as error:
        raise Fault(f"{file} cannot be read ({error.strerror}); {CURE}") from None
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise Fault(f"{file} is damaged ({type(error).__name__}: {str(error)[:80]}); {CURE}") from None


def _sample(folder: Path, record: Mapping[str, Any]) -> Sample:
    picture, noised = (_picture(folder, record[key]) for key in ("picture", "noised"))
    return Sample(
        id=_letters(record["id"]),
        question=_letters(record["question"]),
        preferred=_text(record["preferred"]),
        dispreferred=_text(record["dispreferred"]),
        before=_text(record["before"]),
        after=_text(record["after"]),
        objects=_names(record["objects"]),
        noise=_pieces(record.get("noise")),
        picture=picture[0],
        noised=noised[0],
        gone=tuple(problem for _, problem in (picture, noised) if problem),
    )


def _text(record: Mapping[str, Any]) -> Text:
    text = _letters(record["text"])
    marks = record.get("marks")
    if marks is not None:
        marks = tuple((int(start), int(stop)) for start, stop in marks)
        edges = [edge for mark in marks for edge in mark]
        if edges != sorted(edges) or (edges and edges[0] < 0):
            raise ValueError("marks are not in order")
    return Text(text, marks, _names(record.get("hallucinated")), _names(record.get("true")))


def _pieces(found: Any) -> Pieces | None:
    if found is None:
        return None
    pieces: Pieces = []
    for text, differs in list(found)[:2000]:
        word = _letters(text).lstrip()
        pieces += [(text[: len(text) - len(word)] if pieces else "", ""), (word, "other" if differs else "")]
    return [piece for piece in pieces if piece[0]]


def _letters(text: Any) -> str:
    if not isinstance(text, str):
        raise TypeError(f"{text!r:.40} is not text")
    return text if len(text) <= MOST_LETTERS else text[:MOST_LETTERS] + " […]"


def _names(found: Any) -> tuple[str, ...] | None:
    return None if found is None else tuple(_letters(name) for name in list(found)[:200])


def _picture(folder: Path, name: Any) -> tuple[bytes | None, str]:
    """The encoded picture of a record, or a sentence that says why there is none."""
    if name is None:
        return None, ""
    name = _letters(name)
    file = folder / name
    if os.path.basename(name) != name or file.is_symlink():
        return None, f"{name} leads out of {folder.parent.name}/{FOLDER} and is not shown"
    if not file.is_file():
        return None, f"{name} is missing from {folder.parent.name}/{FOLDER}"
    with file.open("rb") as handle:
        encoded = handle.read(MOST_PICTURE_BYTES + 1)
    if len(encoded) > MOST_PICTURE_BYTES or pages.kind(encoded) is None:
        return None, f"{name} in {folder.parent.name}/{FOLDER} is not a small PNG or JPEG"
    return encoded, ""


@dataclass(frozen=True)
class Entry:
    """The caption of one run after training; ``change``: better, worse, same or unknown, by hallucinated objects."""

    row: int
    label: str
    after: Pieces
    noise: Pieces | None
    change: str
    counts: str


@dataclass
class Card:
    """One picture as the runs described it that agree in everything but the caption after training."""

    id: str
    world: tuple[str, ...]
    objects: tuple[str, ...] | None
    question: str
    preferred: Pieces
    dispreferred: Pieces
    before: Pieces
    pictures: list[tuple[str, str]] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)

    @property
    def size(self) -> int:
        return len(self.entries)

    @property
    def noise(self) -> bool:
        """Whether a caption comes with what the model says of the noised picture."""
        return any(entry.noise for entry in self.entries)


def cards(found: Iterable[tuple[int, str, str, tuple[str, ...], Sequence[Sample]]]) -> list[Card]:
    """Cards of (row number, label of the row, seed, world, samples) of each run, in order of first appearance.

    Captions of one picture by several runs share a card only if the runs agree in world, picture, question, responses,
    objects and the caption before training. A card names its world (model and data) if there are several. At most
    ``NOISED_SHOWN`` different noised pictures are shown.
    """
    made: dict[tuple, tuple[Card, dict[bytes, tuple[str, str]]]] = {}
    for row, label, seed, world, samples in found:
        for sample in samples:
            texts = (sample.id, sample.question, sample.preferred, sample.dispreferred, sample.before)
            key = (world, texts, sample.objects, sample.picture)
            if key not in made:
                card = Card(
                    sample.id,
                    world,
                    sample.objects,
                    sample.question,
                    sample.preferred.pieces,
                    sample.dispreferred.pieces,
                    sample.before.pieces,
                )
                if sample.picture:
                    card.pictures.append((pages.address(sample.picture), "picture"))
                made[key] = card, {}
            card, noised = made[key]
            card.gone += [sentence for sentence in sample.gone if sentence not in card.gone]
            if sample.noised:
                noised.setdefault(sample.noised, (seed, label))
            change, counts = _change(sample)
            card.entries.append(
                Entry(row, f"{label}, {seed}" if seed else label, sample.after.pieces, sample.noise, change, counts)
            )
    for card, noised in made.values():
        seeds = [seed for seed, _ in noised.values()]
        for picture, (seed, label) in list(noised.items())[:NOISED_SHOWN]:
            by = seed if seeds.count(seed) == 1 else f"{label}, {seed}"
            card.pictures.append((pages.address(picture), f"noised, {by}" if len(noised) > 1 else "noised"))
        if len(noised) > NOISED_SHOWN:
            card.gone.append(f"{len(noised) - NOISED_SHOWN} more noised pictures in the run folders")
    if len({card.world for card, _ in made.values()}) == 1:
        for card, _ in made.values():
            card.world = ()
    return [card for card, _ in made.values()]


def _change(sample: Sample) -> tuple[str, str]:
    """What became of a caption, and its counts in words."""
    before, after = sample.before, sample.after
    if before.hallucinated is None or after.hallucinated is None:
        return "unknown", ""
    was, now = len(before.hallucinated), len(after.hallucinated)
    change = "better" if now < was else "worse" if now > was else "same"
    true = f"; true {len(before.true or ())} → {len(after.true or ())}"
    return change, f"hallucinated {was} → {now}{true}"


def write_captions(run: Path, title: str, facts: str) -> Path:
    """Write ``captions.html``, the samples of one run folder as a page; return it."""
    return pages.write(
        run / "captions.html",
        "captions.html",
        scripts=("samples.js",),
        title=title,
        facts=facts,
        cards=cards([(0, "after training", "", (), read(run))]),
    )
