"""POVID's release: ``id, image, conversations, rejected_conversations`` (its README and train_dpo.py)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from povid.fault import Fault
from povid.files import write_bytes, write_json
from povid.preferences.pictures import find_pictures
from povid.preferences.records import IMAGE_MARKER, gather, label, member, name_of, turns_of
from povid.preferences.stored import Picture, picture_bytes
from povid.preferences.triple import Triple, Turn

KEYS = ("id", "image", "conversations", "rejected_conversations")
SUFFIXES = {b"\xff\xd8": "jpg", b"\x89PNG": "png", b"GIF8": "gif", b"BM": "bmp", b"RIFF": "webp"}  # by first bytes


def read(preferences: Path, images: Path | None = None, skipped: list[str] | None = None) -> list[Triple]:
    """Read the release's JSON; further keys of a record go to ``Triple.meta``.

    ``image`` may also be a list of several pictures, or an empty one for a record without any.
    """
    return gather(preferences, images, skipped, _triples)


def _triples(record: Mapping[str, Any], images: Path | None, place: str) -> Iterator[Triple]:
    at = label(record)
    conversation = member(record, "conversations", at)
    preferred = turns_of(conversation, at, "conversations")
    marks = sum(turn["value"].count(IMAGE_MARKER) for turn in conversation if turn["from"] == "human")
    yield Triple(
        id=name_of(member(record, "id", at), at),
        image=find_pictures(member(record, "image", at), images, at, "image", marks),
        preferred=preferred,
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
            "conversations": _conversation(triple.preferred, len(triple.pictures)),
            "rejected_conversations": _conversation(triple.dispreferred, len(triple.pictures)),
        }
        for triple in triples
    ]
    write_json(Path(preferences), records)


def _conversation(turns: tuple[Turn, ...], pictures: int) -> list[dict[str, str]]:
    speakers = {"user": "human", "assistant": "gpt"}
    lines = [{"from": speakers[turn.role], "value": turn.text} for turn in turns]
    lines[0]["value"] = f"{IMAGE_MARKER}\n" * pictures + lines[0]["value"]
    return lines


def _stored(triple: Triple, images: Path) -> str | list[str]:
    """The path of the triple's picture inside ``images``, or a list of paths unless it is one."""
    paths = [_path(triple, picture, number, images) for number, picture in enumerate(triple.pictures)]
    return paths[0] if len(paths) == 1 else paths


def _path(triple: Triple, picture: Picture, number: int, images: Path) -> str:
    """The path of a picture inside ``images``, where its bytes are written if they are not there yet."""
    if isinstance(picture, Path):
        try:
            return picture.resolve().relative_to(images.resolve()).as_posix()
        except ValueError:
            raise Fault(
                f"record {triple.id!r}: its picture {picture} is not in {images}; give the folder that "
                "holds all pictures"
            ) from None
    encoded = picture_bytes(picture)
    suffix = next((suffix for start, suffix in SUFFIXES.items() if encoded.startswith(start)), "img")
    stem = re.sub(r"[^A-Za-z0-9_-]", "_", triple.id)[:100] + (f"_{number}" if number else "")
    name = f"{stem}.{suffix}"
    file = images / name
    if not file.exists():
        write_bytes(file, encoded)
    elif file.read_bytes() != picture:
        raise Fault(
            f"record {triple.id!r}: {file} already holds another picture; give an empty image folder or distinct ids"
        )
    return name
