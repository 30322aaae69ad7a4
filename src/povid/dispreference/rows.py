"""What dispreferences are made from: LLaVA-Instruct records, or rows of image, question and answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from povid.dispreference.prompts import KINDS, Kind, kind_of
from povid.fault import Fault
from povid.preferences.formats import conversation_turns
from povid.preferences.records import gather, mapping, member, name_of, picture, show, text
from povid.preferences.triple import Triple, Turn


@dataclass(frozen=True, slots=True)
class Row:
    """A question about a picture and its correct answer; ``earlier`` turns of the conversation stay as they are."""

    id: str
    image: Path | bytes
    question: str
    answer: str
    kind: Kind
    earlier: tuple[Turn, ...] = ()

    def triple(self, preferred: str, dispreferred: str) -> Triple:
        asked = (*self.earlier, Turn("user", self.question))
        return Triple(
            self.id,
            self.image,
            (*asked, Turn("assistant", preferred)),
            (*asked, Turn("assistant", dispreferred)),
            "dispreference",
        )


def read_rows(
    path: Path, images: Path, *, kind: str = "auto", rounds: str = "first", skipped: list[str] | None = None
) -> list[Row]:
    """Read JSON, JSON Lines, CSV or parquet.

    A record has ``image`` and either ``conversations`` (LLaVA-Instruct) or ``question`` and ``answer``; ``id`` may be
    absent from the latter. Its own ``prompt`` (captioning or reasoning) goes before ``kind``, which is one of them or
    ``auto`` (:func:`kind_of`). ``rounds`` of a conversation: ``first`` takes its first question, ``each`` makes a row
    of every one, with the turns before it kept. ``skipped`` as in :mod:`povid.preferences.formats`.

    Raises:
        Fault: file, entry, record and key of the first record that cannot be used, or how many pictures are missing.
    """
    if kind != "auto" and kind not in KINDS:
        raise Fault(f"prompt={kind} does not exist; choose auto, captioning or reasoning")
    if rounds not in ("first", "each"):
        raise Fault(f"rounds={rounds} does not exist; choose first or each")
    if not Path(images).is_dir():
        raise Fault(f"image folder {images} does not exist; give the folder that holds the pictures of {path}")
    rows = gather(
        path,
        images,
        skipped,
        lambda record, place: _rows(mapping(record, "record"), Path(images), place.rpartition(" ")[2], kind, rounds),
        "set skip_bad=true",
    )
    if not rows:
        raise Fault(f"{path} holds no record that can be used; mend those that were skipped")
    return rows


def _rows(record: Mapping[str, Any], images: Path, number: str, kind: str, rounds: str) -> Iterator[Row]:
    at = f"record {show(record['id'])}" if "id" in record else f"record {number}"
    id = name_of(record["id"], at) if record.get("id") is not None else number
    image = picture(member(record, "image", at), images, at)
    if "conversations" in record:
        turns = conversation_turns(record["conversations"], at, "conversations")
        if len(turns) % 2 or any(turn.role != ("user", "assistant")[n % 2] for n, turn in enumerate(turns)):
            raise Fault(
                f"{at}: conversations must alternate human and gpt and end with gpt; mend the record or remove it"
            )
    else:
        asked = text(member(record, "question", at), at, "question").replace("<image>", "").strip()
        turns = (
            Turn("user", text(asked, at, "question")),
            Turn("assistant", text(member(record, "answer", at), at, "answer")),
        )
    own = record.get("prompt")
    if own is not None and own not in KINDS:
        raise Fault(f"{at}: prompt must be captioning or reasoning, found {show(own)}; mend the record")
    count = 1 if rounds == "first" else len(turns) // 2
    for turn in range(count):
        question, answer = turns[2 * turn].text, turns[2 * turn + 1].text
        chosen = own or (kind if kind != "auto" else kind_of(question))
        yield Row(id if count == 1 else f"{id}-{turn}", image, question, answer, chosen, turns[: 2 * turn])
