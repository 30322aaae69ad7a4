"""Readers of preference data, one function per published format, and writers of two of them.

Every reader takes ``(path, images, skipped)`` and returns whole conversations as :class:`Triple`:

- ``path`` is a .json, .jsonl or .parquet file, or a folder of parquet shards;
- ``images`` is the folder of the pictures (``None`` if the records carry them);
- ``skipped`` decides about bad records: ``None`` raises the first one's Fault, a list takes their sentences instead.

Formats are described by their public data cards and loaders; each function names the one it follows.
"""

from __future__ import annotations

import base64
import binascii
import difflib
import itertools
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from povid.fault import Fault
from povid.preferences.records import (
    gather,
    listing,
    mapping,
    member,
    name_of,
    picture,
    show,
    text,
)
from povid.preferences.triple import Triple, Turn

IMAGE_MARKER = "<image>"
VLFEEDBACK_ASPECTS = ("Helpfulness", "Ethical Considerations", "Visual Faithfulness")


def read(format: str, path: Path, images: Path | None = None, skipped: list[str] | None = None) -> list[Triple]:
    """Read ``path`` in one of the formats of :data:`READERS`.

    Raises:
        Fault: unknown format; or file, entry, record and key of the first record that cannot be used.
    """
    if format not in READERS:
        near = difflib.get_close_matches(format, READERS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(READERS)}"
        raise Fault(f"format {format!r} of preference data does not exist; {hint}")
    return READERS[format](Path(path), Path(images) if images is not None else None, skipped)


def read_povid(path: Path, images: Path | None = None, skipped: list[str] | None = None) -> list[Triple]:
    """POVID's release: ``id, image, conversations, rejected_conversations`` (README and train_dpo.py)."""
    return _read(path, images, skipped, "povid", _povid)


def read_vlfeedback(path: Path, images: Path | None = None, skipped: list[str] | None = None) -> list[Triple]:
    """VLFeedback: every pair of a prompt's completions, the higher mean rating preferred (vlf-silkie run_dpo.py).

    The rating of a completion is the mean of :data:`VLFEEDBACK_ASPECTS`. Pairs are left out, as the official rule
    does, when the means tie or a rating is not a number ("N/A"), and also when a response is empty or both are equal,
    from which nothing can be learned.
    """
    return _read(path, images, skipped, "vlfeedback", _vlfeedback)


def read_human_preference(path: Path, images: Path | None = None, skipped: list[str] | None = None) -> list[Triple]:
    """LLaVA-RLHF: ``output_1`` or ``output_2`` replaces the last turn, ``preference`` says which is preferred."""
    return _read(path, images, skipped, "human_preference", _human_preference)


def read_rlhf_v(path: Path, images: Path | None = None, skipped: list[str] | None = None) -> list[Triple]:
    """RLHF-V: ``text`` holds question, chosen and rejected as JSON (an object, a list, or either in base64)."""
    return _read(path, images, skipped, "rlhf_v", _rlhf_v)


def read_rlaif_v(path: Path, images: Path | None = None, skipped: list[str] | None = None) -> list[Triple]:
    """RLAIF-V: flat columns ``image, question, chosen, rejected`` (muffin/data/datasets.py)."""
    return _read(path, images, skipped, "rlaif_v", _rlaif_v)


def read_trl(path: Path, images: Path | None = None, skipped: list[str] | None = None) -> list[Triple]:
    """TRL's conversational preference layout: ``images, prompt, chosen, rejected`` (examples/datasets/rlaif-v.py)."""
    return _read(path, images, skipped, "trl", _trl)


Reader = Callable[[Path, Path | None, list[str] | None], list[Triple]]
READERS: dict[str, Reader] = {
    "povid": read_povid,
    "vlfeedback": read_vlfeedback,
    "human_preference": read_human_preference,
    "rlhf_v": read_rlhf_v,
    "rlaif_v": read_rlaif_v,
    "trl": read_trl,
}


def _read(path: Path, images: Path | None, skipped: list[str] | None, source: str, build: Callable) -> list[Triple]:
    if images is not None and not Path(images).is_dir():
        raise Fault(f"image folder {images} does not exist; give the folder that holds the pictures of {path}")
    return gather(
        path,
        images,
        skipped,
        lambda record, place: build(record, images, place, source),
        "skip such records explicitly",
    )


def _label(record: Mapping[str, Any], key: str = "id") -> str:
    return f"record {show(record[key])}" if key in record else "record without id"


def _povid(record: Any, images: Path | None, place: str, source: str) -> Iterator[Triple]:
    record = mapping(record, "record")
    at = _label(record)
    yield Triple(
        id=name_of(member(record, "id", at), at),
        image=picture(member(record, "image", at), images, at),
        preferred=conversation_turns(member(record, "conversations", at), at, "conversations"),
        dispreferred=conversation_turns(member(record, "rejected_conversations", at), at, "rejected_conversations"),
        source=source,
        meta={
            key: value
            for key, value in record.items()
            if key not in ("id", "image", "conversations", "rejected_conversations")
        },
    )


def _vlfeedback(record: Any, images: Path | None, place: str, source: str) -> Iterator[Triple]:
    record = mapping(record, "record")
    at = _label(record)
    number = name_of(member(record, "id", at), at)
    image = picture(member(record, "img_path", at), images, at, "img_path")
    prompt = _unmarked(text(member(record, "prompt", at), at, "prompt"), at, "prompt")
    rated = []
    for index, completion in enumerate(_completions(member(record, "completions", at), at)):
        key = f"completions[{index}]"
        completion = mapping(completion, at, key)
        response = text(member(completion, "response", at, key), at, f"{key}.response", empty=True)
        notes = mapping(member(completion, "annotations", at, key), at, f"{key}.annotations")
        ratings = [_rating(notes, aspect, at, key) for aspect in VLFEEDBACK_ASPECTS]
        rated.append((index, response, None if None in ratings else sum(ratings) / len(ratings)))
    for (i, first, a), (j, second, b) in itertools.combinations(rated, 2):
        if a is None or b is None or a == b or first == second or not first.strip() or not second.strip():
            continue
        good, bad = (first, second) if a > b else (second, first)
        yield _single(f"{number}-{i}-{j}", image, prompt, good, bad, source, {"ratings": (max(a, b), min(a, b))})


def _completions(value: Any, at: str) -> list[Any]:
    if isinstance(value, Mapping):  # the `datasets` library turns a list of objects into an object of lists
        columns = {key: listing(column, at, f"completions.{key}") for key, column in value.items()}
        if len({len(column) for column in columns.values()}) != 1:
            raise Fault(f"{at}: the lists in completions differ in length; mend the record or remove it")
        return [dict(zip(columns, row)) for row in zip(*columns.values())]
    return listing(value, at, "completions")


def _rating(notes: Mapping[str, Any], aspect: str, at: str, key: str) -> float | None:
    note = mapping(member(notes, aspect, at, f"{key}.annotations"), at, f"{key}.annotations.{aspect}")
    value = note.get("Rating")
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        rating = float(value)
    except (ValueError, OverflowError):
        return None
    return rating if math.isfinite(rating) else None


def _human_preference(record: Any, images: Path | None, place: str, source: str) -> Iterator[Triple]:
    record = mapping(record, "record")
    at = _label(record)
    number = name_of(member(record, "id", at), at)
    turns = conversation_turns(member(record, "conversations", at), at, "conversations", placeholder=True)
    if turns[-1].role != "assistant":
        raise Fault(
            f"{at}: conversations must end with the gpt turn that the outputs replace, found a human turn; "
            "mend the record or remove it"
        )
    choice = member(record, "preference", at)
    if isinstance(choice, bool) or choice not in (1, 2):
        raise Fault(f"{at}: preference must be 1 or 2, found {show(choice)}; mend the record or remove it")
    outputs = []
    for key in ("output_1", "output_2"):
        output = mapping(member(record, key, at), at, key)
        outputs.append(Turn("assistant", text(member(output, "value", at, key), at, f"{key}.value")))
    good, bad = outputs if choice == 1 else reversed(outputs)
    image = picture(member(record, "image", at), images, at)
    yield Triple(number, image, (*turns[:-1], good), (*turns[:-1], bad), source)


def _rlhf_v(record: Any, images: Path | None, place: str, source: str) -> Iterator[Triple]:
    record = mapping(record, "record")
    at = _label(record, "idx")
    fields = _packed(member(record, "text", at), at)
    question, good, bad = (text(member(fields, key, at, "text"), at, f"text.{key}") for key in _FIELDS)
    number = name_of(record["idx"], at, "idx") if record.get("idx") is not None else place.rpartition(" ")[2]
    yield _single(
        number,
        _columns_picture(record, images, at),
        _unmarked(question, at, "text.question"),
        good,
        bad,
        source,
        _origin(record),
    )


_FIELDS = ("question", "chosen", "rejected")


def _packed(value: Any, at: str) -> Mapping[str, Any]:
    """The question and both responses of RLHF-V's ``text`` column, whichever release packed it."""
    if isinstance(value, str):
        packed = text(value, at, "text")
        try:
            if re.fullmatch(r"[A-Za-z0-9+/\s]+=*\s*", packed):
                packed = base64.b64decode(packed, validate=False).decode("utf-8")
            value = json.loads(packed)
        except (ValueError, RecursionError, binascii.Error):
            raise Fault(
                f"{at}: text is not JSON with question, chosen and rejected, found {show(packed)}; mend the "
                "record or remove it"
            ) from None
    if isinstance(value, list) and len(value) == len(_FIELDS):
        return dict(zip(_FIELDS, value))
    return mapping(value, at, "text")


def _rlaif_v(record: Any, images: Path | None, place: str, source: str) -> Iterator[Triple]:
    record = mapping(record, "record")
    at = _label(record, "idx")
    question, good, bad = (text(member(record, key, at), at, key) for key in _FIELDS)
    number = name_of(record["idx"], at, "idx") if record.get("idx") is not None else place.rpartition(" ")[2]
    yield _single(
        number,
        _columns_picture(record, images, at),
        _unmarked(question, at, "question"),
        good,
        bad,
        source,
        _origin(record),
    )


def _columns_picture(record: Mapping[str, Any], images: Path | None, at: str) -> Path | bytes:
    key = "image" if record.get("image") else "image_path"
    return picture(member(record, key, at), images, at, key)


def _origin(record: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("ds_name", "origin_dataset", "origin_split")
    return {key: record[key] for key in keys if isinstance(record.get(key), str)}


def _trl(record: Any, images: Path | None, place: str, source: str) -> Iterator[Triple]:
    yield from_trl(mapping(record, "record"), images, default_id=place.rpartition(" ")[2], source=source)


def _single(id: str, image: Path | bytes, question: str, good: str, bad: str, source: str, meta: dict) -> Triple:
    asked = Turn("user", question)
    return Triple(id, image, (asked, Turn("assistant", good)), (asked, Turn("assistant", bad)), source, meta)


def conversation_turns(value: Any, at: str, key: str, *, placeholder: bool = False) -> tuple[Turn, ...]:
    """LLaVA's ``[{"from": "human" | "gpt", "value": text}]`` as turns without image markers.

    ``at`` and ``key`` name record and place in a Fault; with ``placeholder`` the last value may be empty.
    """
    turns = []
    value = listing(value, at, key)
    for number, turn in enumerate(value):
        spot = f"{key}[{number}]"
        turn = mapping(turn, at, spot)
        speaker = member(turn, "from", at, spot)
        if speaker not in ("human", "gpt"):
            raise Fault(
                f"{at}: {spot}.from must be 'human' or 'gpt', found {show(speaker)}; mend the record or remove it"
            )
        said = text(
            member(turn, "value", at, spot), at, f"{spot}.value", empty=placeholder and number == len(value) - 1
        )
        turns.append(
            Turn("user", _unmarked(said, at, f"{spot}.value"))
            if speaker == "human"
            else Turn("assistant", said.replace(IMAGE_MARKER, ""))
        )
    return tuple(turns)


def _unmarked(said: str, at: str, key: str) -> str:
    if IMAGE_MARKER in said:
        said = said.replace(IMAGE_MARKER, "").strip()
    if not said.strip():
        raise Fault(f"{at}: {key} asks nothing beside the image marker; write a question or remove the record")
    return said


# --- TRL's layout, both ways ---


def to_trl(triple: Triple) -> dict[str, Any]:
    """One record in TRL's conversational preference layout.

    ``prompt`` holds the turns up to the first assistant turn that differs, ``chosen`` and ``rejected`` the rest, so a
    multi-turn record stays whole. The picture is a ``{"bytes", "path"}`` object, as the `datasets` library reads it.
    """
    shared = next(n for n, (good, bad) in enumerate(zip(triple.preferred, triple.dispreferred)) if good != bad)
    stored = isinstance(triple.image, bytes)
    return {
        "id": triple.id,
        "images": [{"bytes": triple.image if stored else None, "path": None if stored else str(triple.image)}],
        "prompt": [_message(turn, number == 0) for number, turn in enumerate(triple.preferred[:shared])],
        "chosen": [_message(turn, False) for turn in triple.preferred[shared:]],
        "rejected": [_message(turn, False) for turn in triple.dispreferred[shared:]],
    }


def _message(turn: Turn, with_image: bool) -> dict[str, Any]:
    parts = [{"type": "image", "text": None}] if with_image else []
    return {"role": turn.role, "content": [*parts, {"type": "text", "text": turn.text}]}


def from_trl(
    row: Mapping[str, Any], images: Path | None = None, *, default_id: str = "0", source: str = "trl"
) -> Triple:
    """The record of a row in TRL's layout (``prompt`` may be absent when chosen and rejected carry it).

    Raises:
        Fault: names the record and the key at fault.
    """
    at = _label(row) if row.get("id") is not None else f"record {default_id}"
    prompt = _messages(row["prompt"], at, "prompt") if row.get("prompt") else ()
    key = "images" if "images" in row else "image"
    return Triple(
        id=name_of(row["id"], at) if row.get("id") is not None else default_id,
        image=picture(member(row, key, at), images, at, key),
        preferred=prompt + _messages(member(row, "chosen", at), at, "chosen"),
        dispreferred=prompt + _messages(member(row, "rejected", at), at, "rejected"),
        source=source,
    )


def _messages(value: Any, at: str, key: str) -> tuple[Turn, ...]:
    turns = []
    for number, message in enumerate(listing(value, at, key)):
        spot = f"{key}[{number}]"
        message = mapping(message, at, spot)
        role = member(message, "role", at, spot)
        if role not in ("user", "assistant"):
            raise Fault(
                f"{at}: {spot}.role must be 'user' or 'assistant', found {show(role)}; the model's template "
                "brings its own system text, so remove that turn"
            )
        said = _content(member(message, "content", at, spot), at, f"{spot}.content")
        turns.append(Turn(role, _unmarked(said, at, spot) if role == "user" else said))
    return tuple(turns)


def _content(value: Any, at: str, key: str) -> str:
    if isinstance(value, str):
        return text(value, at, key, empty=True)
    said = []
    for number, part in enumerate(listing(value, at, key)):
        part = mapping(part, at, f"{key}[{number}]")
        kind = member(part, "type", at, f"{key}[{number}]")
        if kind == "text":
            said.append(text(member(part, "text", at, f"{key}[{number}]"), at, f"{key}[{number}].text", empty=True))
        elif kind != "image":
            raise Fault(f"{at}: {key}[{number}].type must be 'text' or 'image', found {show(kind)}; remove that part")
    return "\n".join(said)


# --- writers ---


def write_povid(triples: Iterable[Triple], path: Path, images: Path) -> None:
    """Write POVID's release format; pictures that are bytes become files in ``images``, others must lie in it.

    Raises:
        Fault: a picture lies outside ``images``, or two records bring different pictures under one name.
    """
    rows = []
    for triple in triples:
        rows.append(
            {
                "id": triple.id,
                "image": _stored(triple, Path(images)),
                "conversations": _conversation(triple.preferred),
                "rejected_conversations": _conversation(triple.dispreferred),
            }
        )
    write_atomically(Path(path), json.dumps(rows, ensure_ascii=False, indent=1).encode("utf-8"))


def _conversation(turns: tuple[Turn, ...]) -> list[dict[str, str]]:
    lines = []
    for number, turn in enumerate(turns):
        said = f"{IMAGE_MARKER}\n{turn.text}" if number == 0 else turn.text
        lines.append({"from": "human" if turn.role == "user" else "gpt", "value": said})
    return lines


def _stored(triple: Triple, images: Path) -> str:
    if isinstance(triple.image, Path):
        try:
            return triple.image.resolve().relative_to(images.resolve()).as_posix()
        except ValueError:
            raise Fault(
                f"record {triple.id!r}: its picture {triple.image} is not in {images}; give the folder that "
                "holds all pictures"
            ) from None
    kind = next((end for start, end in _ENDINGS.items() if triple.image.startswith(start)), "img")
    name = f"{re.sub(r'[^A-Za-z0-9_-]', '_', triple.id)[:100]}.{kind}"
    file = images / name
    if not file.exists():
        images.mkdir(parents=True, exist_ok=True)
        write_atomically(file, triple.image)
    elif file.read_bytes() != triple.image:
        raise Fault(
            f"record {triple.id!r}: {file} already holds another picture; give an empty image folder or distinct ids"
        )
    return name


_ENDINGS = {b"\xff\xd8": "jpg", b"\x89PNG": "png", b"GIF8": "gif", b"BM": "bmp", b"RIFF": "webp"}


def write_trl(triples: Iterable[Triple], path: Path) -> None:
    """Write TRL's layout as parquet with the pictures inside, 64 records at a time; `datasets` reads it as it is."""
    import pyarrow
    import pyarrow.parquet

    message = pyarrow.list_(
        pyarrow.struct(
            [
                ("role", pyarrow.string()),
                ("content", pyarrow.list_(pyarrow.struct([("type", pyarrow.string()), ("text", pyarrow.string())]))),
            ]
        )
    )
    image = pyarrow.list_(pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())]))
    schema = pyarrow.schema(
        [("id", pyarrow.string()), ("images", image), ("prompt", message), ("chosen", message), ("rejected", message)]
    )
    # tells `datasets` that the column holds pictures, which parquet alone cannot say
    features = {
        "info": {
            "features": {
                "id": {"dtype": "string", "_type": "Value"},
                "images": {"feature": {"_type": "Image"}, "_type": "List"},
                **{
                    key: {
                        "feature": {
                            "role": {"dtype": "string", "_type": "Value"},
                            "content": {
                                "feature": {
                                    "type": {"dtype": "string", "_type": "Value"},
                                    "text": {"dtype": "string", "_type": "Value"},
                                },
                                "_type": "List",
                            },
                        },
                        "_type": "List",
                    }
                    for key in ("prompt", "chosen", "rejected")
                },
            }
        }
    }
    schema = schema.with_metadata({"huggingface": json.dumps(features)})
    with _in_place_of(Path(path)) as name, pyarrow.parquet.ParquetWriter(name, schema) as writer:
        for batch in _batched(triples, 64):
            rows = [to_trl(triple) for triple in batch]
            for row in rows:
                entry = row["images"][0]
                if entry["bytes"] is None:
                    entry.update(bytes=_whole(row["id"], entry["path"]), path=Path(entry["path"]).name)
            writer.write_batch(pyarrow.RecordBatch.from_pylist(rows, schema=schema))


def _whole(record: str, picture: str) -> bytes:
    try:
        return Path(picture).read_bytes()
    except OSError as error:
        raise Fault(
            f"record {record!r}: picture {picture} cannot be read ({error.strerror}); put it there or remove the record"
        ) from None


def _batched(items: Iterable[Triple], size: int) -> Iterator[list[Triple]]:
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch


def write_atomically(path: Path, content: bytes) -> None:
    """Write ``content`` to a temporary file beside ``path`` and put it in place, so that no half file is ever seen.

    Raises:
        Fault: there is no room, no folder or no right to write.
    """
    with _in_place_of(path) as name, open(name, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _in_place_of(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its place unless something goes wrong."""
    temporary = None
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        temporary = Path(name)
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        reason = error.strerror or error
        raise Fault(f"{path} cannot be written ({reason}); make room or choose another place") from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
