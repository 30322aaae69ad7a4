"""What dispreferences are made from (LLaVA-Instruct records, or rows of image, question and answer) and become."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from povid.dispreference.prompts import KINDS, Kind, kind_of
from povid.fault import Fault
from povid.preferences.pictures import find_picture
from povid.preferences.records import IMAGE_MARKER, gather, member, name_of, number_of, show, text, turns_of
from povid.preferences.stored import Picture
from povid.preferences.triple import Triple, Turn


@dataclass(frozen=True, slots=True)
class Row:
    """A question about a picture and its correct answer; ``earlier`` turns of the conversation stay as they are.

    ``answer`` is empty where it is not needed; ``objects`` are those in the picture, if the record lists them.
    """

    id: str
    image: Picture
    question: str
    answer: str
    kind: Kind
    earlier: tuple[Turn, ...] = ()
    objects: tuple[str, ...] | None = None

    def triple(self, preferred: str, dispreferred: str) -> Triple:
        """The preference record with these two answers."""
        asked = (*self.earlier, Turn("user", self.question))
        return Triple(
            self.id,
            self.image,
            (*asked, Turn("assistant", preferred)),
            (*asked, Turn("assistant", dispreferred)),
            "dispreference",
        )


@dataclass(slots=True)
class Made:
    """What became of the rows.

    Attributes:
        triples: in the order of their rows, with the ``kinds`` of their prompts beside them.
        rejects: (id, reasons of all attempts) of each row that was set aside.
        reasons: counts the replies that could not be used, by reason.
        figures: further figures for the report.
    """

    triples: list[Triple] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    rejects: list[tuple[str, list[str]]] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    figures: dict[str, Any] = field(default_factory=dict)


def read_rows(
    path: Path,
    images: Path,
    *,
    kind: str = "auto",
    questions: str = "first",
    answered: bool = True,
    skipped: list[str] | None = None,
) -> list[Row]:
    """Read JSON, JSON Lines, CSV or parquet.

    A record has ``image`` and either ``conversations`` (LLaVA-Instruct) or ``question`` and ``answer``; the latter need
    no ``id``. A record's own ``prompt`` (captioning or reasoning) takes precedence over ``kind``, which is one of them
    or ``auto`` (:func:`kind_of`). Of a conversation, ``questions=first`` takes the first question and ``each`` makes a
    row of every question, with the turns before it kept. Unless ``answered``, answers are not needed
    and not read, and a conversation may end with a question. ``skipped`` as in :mod:`povid.preferences.formats`.

    Raises:
        Fault: names file, entry, record and key of the first record that cannot be used, or counts missing pictures.
    """
    if kind != "auto" and kind not in KINDS:
        raise Fault(f"prompt={kind} does not exist; choose auto, captioning or reasoning")
    if questions not in ("first", "each"):
        raise Fault(f"questions={questions} does not exist; choose first or each")
    reader = functools.partial(_rows, kind=kind, questions=questions, answered=answered)
    rows = gather(path, Path(images), skipped, reader)
    if not rows:
        raise Fault(f"{path} holds no usable record; fix those that were skipped")
    return rows


def _rows(
    record: Mapping[str, Any], images: Path | None, place: str, kind: str, questions: str, answered: bool
) -> Iterator[Row]:
    number = number_of(place)
    at = f"record {show(record['id'])}" if "id" in record else f"record {number}"
    id = name_of(record["id"], at) if record.get("id") is not None else number
    image = find_picture(member(record, "image", at), images, at)
    if "conversations" in record:
        turns = turns_of(record["conversations"], at, "conversations")
        if not answered and len(turns) % 2:
            turns = (*turns, Turn("assistant", ""))
        if len(turns) % 2 or any(turn.role != ("user", "assistant")[n % 2] for n, turn in enumerate(turns)):
            raise Fault(
                f"{at}: conversations must alternate human and gpt and end with gpt; fix the record or remove it"
            )
    else:
        asked = text(member(record, "question", at), at, "question").replace(IMAGE_MARKER, "").strip()
        turns = (
            Turn("user", text(asked, at, "question")),
            Turn("assistant", text(member(record, "answer", at), at, "answer") if answered else ""),
        )
    own = record.get("prompt")
    if own is not None and own not in KINDS:
        raise Fault(f"{at}: prompt must be captioning or reasoning, found {show(own)}; correct it")
    listed = record.get("objects")
    objects = tuple(listed) if isinstance(listed, list) and all(isinstance(one, str) for one in listed) else None
    count = 1 if questions == "first" else len(turns) // 2
    for turn in range(count):
        question, answer = turns[2 * turn].text, turns[2 * turn + 1].text if answered else ""
        chosen: Any = own or (kind if kind != "auto" else kind_of(question))
        yield Row(id if count == 1 else f"{id}-{turn}", image, question, answer, chosen, turns[: 2 * turn], objects)
