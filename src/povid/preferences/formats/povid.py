"""POVID's release: ``id, image, conversations, rejected_conversations`` (its README and train_dpo.py)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from povid.fault import Fault
from povid.files import write_bytes, write_json
from povid.preferences.pictures import find_picture
from povid.preferences.records import IMAGE_MARKER, gather, label, member, name_of, turns_of
from povid.preferences.stored import picture_bytes
from povid.preferences.triple import Triple, Turn

KEYS = ("id", "image", "conversations", "rejected_conversations")
SUFFIXES = {b"\xff\xd8": "jpg", b"\x89PNG": "png", b"GIF8": "gif", b"BM": "bmp", b"RIFF": "webp"}  # by first bytes


def read(preferences: Path, images: Path | None = None, skipped: list[str] | None = None) -> list[Triple]:
    """Read the release's JSON; further keys of a record go to ``Triple.meta``."""
    return gather(preferences, images, skipped, _triples)


def _triples(record: Mapping[str, Any], images: Path | None, place: str) -> Iterator[Triple]:
    at = label(record)
    yield Triple(
        id=name_of(member(record, "id", at), at),
        image=find_picture(member(record, "image", at), images, at),
        preferred=turns_of(member(record, "conversations", at), at, "conversations"),
        dispreferred=turns_of(member(record, "rejected_conversations", at), at, "rejected_conversations"),
        source="povid",
        meta={key: value for key, value in record.items() if key not in KEYS},
    )


def write(triples: Iterable[Triple], preferences: Path, images: Path) -> None:
    """Write the release's JSON.

    Pictures that are bytes become files in ``images``; picture files must lie in it already.

    Raises:
        Fault: a picture lies outside ``images``, or two records give one file name to different pictures.
    """
    records = [
        {
            "id": triple.id,
            "image": _stored(triple, Path(images)),
            "conversations": _conversation(triple.preferred),
            "rejected_conversations": _conversation(triple.dispreferred),
        }
        for triple in triples
    ]
    write_json(Path(preferences), records)


def _conversation(turns: tuple[Turn, ...]) -> list[dict[str, str]]:
    speakers = {"user": "human", "assistant": "gpt"}
    lines = [{"from": speakers[turn.role], "value": turn.text} for turn in turns]
    lines[0]["value"] = f"{IMAGE_MARKER}\n{lines[0]['value']}"
    return lines


def _stored(triple: Triple, images: Path) -> str:
    """The path of the triple's picture inside ``images``, where its bytes are written if they are not there yet."""
    if isinstance(triple.image, Path):
        try:
            return triple.image.resolve().relative_to(images.resolve()).as_posix()
        except ValueError:
            raise Fault(
                f"record {triple.id!r}: its picture {triple.image} is not in {images}; give the folder that "
                "holds all pictures"
            ) from None
    picture = picture_bytes(triple.image)
    suffix = next((suffix for start, suffix in SUFFIXES.items() if picture.startswith(start)), "img")
    name = f"{re.sub(r'[^A-Za-z0-9_-]', '_', triple.id)[:100]}.{suffix}"
    file = images / name
    if not file.exists():
        write_bytes(file, picture)
    elif file.read_bytes() != picture:
        raise Fault(
            f"record {triple.id!r}: {file} already holds another picture; give an empty image folder or distinct ids"
        )
    return name
