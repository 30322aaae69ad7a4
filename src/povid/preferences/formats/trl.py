"""TRL's conversational preference layout: ``images, prompt, chosen, rejected`` (its examples/datasets/rlaif-v.py)."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from povid.fault import Fault
from povid.files import draft
from povid.preferences.pictures import find_pictures
from povid.preferences.records import (
    IMAGE_MARKER,
    gather,
    label,
    listing,
    mapping,
    member,
    name_of,
    number_of,
    show,
    text,
    without_marker,
)
from povid.preferences.stored import Stored, picture_bytes
from povid.preferences.triple import Triple, Turn


def read(preferences: Path, images: Path | None = None, skipped: list[str] | None = None) -> list[Triple]:
    """Read parquet, JSON or JSON Lines; where a record has no ``id``, its number is its id.

    ``images`` may list several pictures, or none.
    """
    return gather(preferences, images, skipped, _triples)


def _triples(record: Mapping[str, Any], images: Path | None, place: str) -> Iterator[Triple]:
    yield from_row(record, images, default_id=number_of(place))


def from_row(row: Mapping[str, Any], images: Path | None = None, *, default_id: str = "0") -> Triple:
    """The triple of one row; ``prompt`` may be missing when chosen and rejected contain it.

    Raises:
        Fault: names the record and the invalid key.
    """
    at = label(row) if row.get("id") is not None else f"record {default_id}"
    prompt = _turns(row["prompt"], at, "prompt") if row.get("prompt") else ()
    key = "images" if "images" in row else "image"
    preferred = prompt + _turns(member(row, "chosen", at), at, "chosen")
    marks = _marks([*(row.get("prompt") or ()), *row["chosen"]])
    return Triple(
        id=name_of(row["id"], at) if row.get("id") is not None else default_id,
        image=find_pictures(member(row, key, at), images, at, key, marks),
        preferred=preferred,
        dispreferred=prompt + _turns(member(row, "rejected", at), at, "rejected"),
        source="trl",
    )


def _turns(value: Any, at: str, key: str) -> tuple[Turn, ...]:
    turns = []
    for number, message in enumerate(listing(value, at, key)):
        place = f"{key}[{number}]"
        message = mapping(message, at, place)
        role = member(message, "role", at, place)
        if role not in ("user", "assistant"):
            raise Fault(
                f"{at}: {place}.role must be 'user' or 'assistant', found {show(role)}; remove that turn (the model's "
                "template adds its own system text)"
            )
        said = _content(member(message, "content", at, place), at, f"{place}.content")
        turns.append(Turn(role, without_marker(said, at, place) if role == "user" else said))
    return tuple(turns)


def _marks(messages: list[Mapping[str, Any]]) -> int:
    """How many places for a picture the user's messages hold."""
    contents = [message["content"] for message in messages if message["role"] == "user"]
    texts = sum(content.count(IMAGE_MARKER) for content in contents if isinstance(content, str))
    parts = [part for content in contents if not isinstance(content, str) for part in content]
    return texts + sum(part["type"] == "image" or (part.get("text") or "").count(IMAGE_MARKER) for part in parts)


def _content(value: Any, at: str, key: str) -> str:
    if isinstance(value, str):
        return text(value, at, key, empty=True)
    said = []
    for number, part in enumerate(listing(value, at, key)):
        place = f"{key}[{number}]"
        part = mapping(part, at, place)
        kind = member(part, "type", at, place)
        if kind == "text":
            said.append(text(member(part, "text", at, place), at, f"{place}.text", empty=True))
        elif kind != "image":
            raise Fault(f"{at}: {place}.type must be 'text' or 'image', found {show(kind)}; remove that part")
    return "\n".join(said)


def write(triples: Iterable[Triple], preferences: Path, images: Path | None = None) -> None:
    """Write parquet with the pictures inside, 64 records at a time; the `datasets` library reads it directly.

    ``images`` is not used.

    Raises:
        Fault: a picture cannot be read.
    """
    import pyarrow
    import pyarrow.parquet

    schema = _schema()
    with draft(Path(preferences)) as beside, pyarrow.parquet.ParquetWriter(beside, schema) as writer:
        triples = iter(triples)
        while batch := list(itertools.islice(triples, 64)):
            rows = [to_row(triple) for triple in batch]
            for row in rows:
                for entry in row["images"]:
                    if entry["bytes"] is None:
                        entry.update(bytes=_bytes_of(row["id"], entry["path"]), path=Path(entry["path"]).name)
            writer.write_batch(pyarrow.RecordBatch.from_pylist(rows, schema=schema))


def to_row(triple: Triple) -> dict[str, Any]:
    """One triple as a row.

    ``prompt`` holds the turns up to the first assistant turn that differs, ``chosen`` and ``rejected`` the rest, so a
    multi-turn record stays whole. A picture is a ``{"bytes", "path"}`` object, as the `datasets` library reads it.
    """
    shared = next(n for n, (good, bad) in enumerate(zip(triple.preferred, triple.dispreferred)) if good != bad)
    prompt = [_message(turn) for turn in triple.preferred[:shared]]
    prompt[0]["content"][:0] = [{"type": "image", "text": None} for _ in triple.pictures]
    return {
        "id": triple.id,
        "images": [
            {"bytes": None, "path": str(picture)} if isinstance(picture, Path) else _inside(picture)
            for picture in triple.pictures
        ],
        "prompt": prompt,
        "chosen": [_message(turn) for turn in triple.preferred[shared:]],
        "rejected": [_message(turn) for turn in triple.dispreferred[shared:]],
    }


def _inside(image: bytes | Stored) -> dict[str, Any]:
    return {"bytes": picture_bytes(image), "path": None}


def _message(turn: Turn) -> dict[str, Any]:
    return {"role": turn.role, "content": [{"type": "text", "text": turn.text}]}


def _bytes_of(record: str, picture: str) -> bytes:
    try:
        return Path(picture).read_bytes()
    except OSError as error:
        raise Fault(
            f"record {record!r}: picture {picture} cannot be read ({error.strerror}); add the file or remove the record"
        ) from None


def _schema() -> Any:
    """The layout as a parquet schema, with the metadata that tells `datasets` which column holds pictures."""
    import pyarrow

    string = pyarrow.string()
    part = pyarrow.struct([("type", string), ("text", string)])
    messages = pyarrow.list_(pyarrow.struct([("role", string), ("content", pyarrow.list_(part))]))
    image = pyarrow.list_(pyarrow.struct([("bytes", pyarrow.binary()), ("path", string)]))
    columns = {"id": string, "images": image, **dict.fromkeys(("prompt", "chosen", "rejected"), messages)}
    value = {"dtype": "string", "_type": "Value"}
    listed = {
        "feature": {"role": value, "content": {"feature": {"type": value, "text": value}, "_type": "List"}},
        "_type": "List",
    }
    features = {
        "id": value,
        "images": {"feature": {"_type": "Image"}, "_type": "List"},
        **dict.fromkeys(("prompt", "chosen", "rejected"), listed),
    }
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pyarrow.schema(list(columns.items()), metadata=metadata)
