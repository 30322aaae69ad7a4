"""Records of a JSON, JSON Lines, CSV or parquet file, and the checked values in them.

Everything here is about input that somebody else made: each damaged value is a Fault that says what was found.
"""

from __future__ import annotations

import base64
import binascii
import csv
import io
import json
import os
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, TypeVar

from povid.fault import Fault

Built = TypeVar("Built")
LONGEST_TEXT = 100_000  # characters in one turn: nothing that a model can read is longer
LONGEST_ID = 300
LARGEST_JSON = 8 << 30  # bytes: a JSON list has to fit in memory, JSON Lines and parquet do not
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"BM", b"RIFF", b"II*\x00", b"MM\x00*")

_shown = reprlib.Repr()
_shown.maxstring = _shown.maxother = 60
_shown.maxdict = _shown.maxlist = 4
_shown.maxlevel = 2


class MissingImage(Fault):
    """The picture of a record is not in the image folder; readers gather these into one sentence."""

    def __init__(self, record: str, name: str):
        super().__init__(f"{record}: the picture {show(name)} is not in the image folder")
        self.name = name


def show(value: Any) -> str:
    """A value as an error message can show it: short, on one line, whatever it is."""
    return _shown.repr(value).encode("utf-8", "backslashreplace").decode()


def gather(
    path: Path, images: Path | None, skipped: list[str] | None, build: Callable[[Any, str], Iterable[Built]], cure: str
) -> list[Built]:
    """``build(record, place)`` of every record of a file.

    A bad record raises its Fault, or adds its sentence to ``skipped`` if that is a list; missing pictures are counted
    first, and the Fault that names them ends with ``cure``.
    """
    built: list[Built] = []
    missing: list[str] = []
    for place, record in records(path):
        try:
            if isinstance(record, Fault):
                raise record
            built.extend(build(record, place))
        except Fault as fault:
            sentence = str(fault) if str(fault).startswith(place) else f"{place}: {fault}"
            if skipped is not None:
                skipped.append(sentence)
            elif isinstance(fault, MissingImage):
                missing.append(fault.name)
            else:
                raise Fault(sentence) from None
    if missing:
        first = ", ".join(show(name) for name in missing[:3])
        raise Fault(
            f"{path}: {len(missing)} pictures are not in {images} (first: {first}); put them there, give "
            f"another image folder, or {cure}"
        )
    return built


def records(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (place, record) for every record of ``path``, a file by its suffix or a folder of parquet shards.

    ``place`` names the file and the entry (lists: counted from 0; lines: from 1). A line that is not JSON comes as the
    Fault that describes it, so that a reader may skip it.

    Raises:
        Fault: the file is missing, empty, of another kind, or damaged as a whole.
    """
    path = Path(path)
    if not path.exists():
        raise Fault(f"{path} does not exist; give the file that holds the records")
    if path.is_dir():
        shards = sorted(path.glob("*.parquet"))
        if not shards:
            raise Fault(f"{path} is a folder without .parquet files; give a .json, .jsonl or .parquet file")
    elif path.suffix.lower() in _READERS:
        shards = [path]
    else:
        raise Fault(
            f"{path} ends in {path.suffix or 'no suffix'!r}; records are read from .json, .jsonl, .csv "
            "and .parquet files"
        )
    found = False
    for shard in shards:
        for place, record in _READERS[shard.suffix.lower()](shard):
            found = True
            yield place, record
    if not found:
        raise Fault(f"{path} holds no records; give a file that has some")


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    if path.stat().st_size > LARGEST_JSON:
        raise Fault(
            f"{path} has {path.stat().st_size:,} bytes, too many for one JSON list; turn it into JSON Lines "
            "(.jsonl) or parquet"
        )
    value = parse_json(path)
    if not isinstance(value, list):
        raise Fault(f"{path} must be a JSON list of records, found {_kind(value)}; put the records into one list")
    for index, record in enumerate(value):
        yield f"{path}, entry {index}", record


def parse_json(path: Path) -> Any:
    """What a JSON file holds. Raises Fault when it cannot be read."""
    return _parse(_decode(_bytes(path), str(path)), str(path))


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                place = f"{path}, line {number}"
                try:
                    yield place, _parse(_decode(line, place), place)
                except Fault as fault:
                    yield place, fault
    except OSError as error:
        raise Fault(f"{path} cannot be read ({error.strerror}); check the file and its rights") from None


def _csv(path: Path) -> Iterator[tuple[str, Any]]:
    text = _decode(_bytes(path), str(path))
    try:
        rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        for index, row in enumerate(rows):
            yield f"{path}, row {index}", {key: value for key, value in row.items() if key is not None and value}
    except csv.Error as error:
        raise Fault(f"{path} is not a CSV table ({error}); mend it or write JSON Lines instead") from None


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        index = 0
        for batch in file.iter_batches(batch_size=64):
            for record in batch.to_pylist():
                yield f"{path}, row {index}", record
                index += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, OverflowError) as error:
        raise Fault(f"{path} is not a sound parquet file ({one_line(error)}); fetch or write it again") from None


_READERS = {".json": _json, ".jsonl": _json_lines, ".ndjson": _json_lines, ".csv": _csv, ".parquet": _parquet}


def one_line(error: Exception) -> str:
    """The message of another library's exception on one line."""
    return " ".join(str(error).split())[:160] or type(error).__name__


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise Fault(f"{path} cannot be read ({error.strerror}); check the file and its rights") from None


def _decode(raw: bytes, place: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"0x{raw[error.start]:02x} at byte {error.start}"
        raise Fault(f"{place} is not UTF-8 ({found}); save it as UTF-8") from None


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        where = f"{error.msg} at line {error.lineno} column {error.colno}"
        lines = error.msg == "Extra data"
        cure = "if it holds a record per line, name it .jsonl" if lines else "mend it or fetch it again"
        raise Fault(f"{place} is not valid JSON ({where}); {cure}") from None
    except RecursionError:
        raise Fault(f"{place} nests lists or objects too deeply to be records; mend it or fetch it again") from None
    except ValueError as error:  # NaN and Infinity from _no_constant, integers of thousands of digits from Python
        raise Fault(f"{place} holds a number that JSON does not allow ({one_line(error)}); mend it") from None


def _no_constant(name: str) -> None:
    raise ValueError(name)


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", type(None): "null", bool: "true or false"}
    return kinds.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


# --- checked values of one record; every Fault starts with `record`, the name the reader gave it ---


def mapping(value: Any, record: str, key: str = "") -> Mapping[str, Any]:
    """``value`` as an object."""
    if not isinstance(value, Mapping):
        raise Fault(
            f"{record}: {key or 'the record'} must be an object, found {_kind(value)} {show(value)}; "
            "mend the record or remove it"
        )
    return value


def listing(value: Any, record: str, key: str) -> list[Any]:
    """``value`` as a list with at least one entry."""
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else f"{_kind(value)} {show(value)}"
        raise Fault(f"{record}: {key} must be a list with entries, found {found}; mend the record or remove it")
    return value


def member(value: Mapping[str, Any], key: str, record: str, inside: str = "") -> Any:
    """``value[key]``, which must be there."""
    if key not in value or value[key] is None:
        have = ", ".join(show(name) for name in list(value)[:8]) or "none"
        raise Fault(
            f"{record}: key {key!r} is missing{f' in {inside}' if inside else ''} (keys found: {have}); "
            "add it or remove the record"
        )
    return value[key]


def text(value: Any, record: str, key: str, *, empty: bool = False) -> str:
    """``value`` as text that can be encoded, is not absurdly long and, unless ``empty``, says something."""
    if not isinstance(value, str):
        raise Fault(f"{record}: {key} must be text, found {_kind(value)} {show(value)}; mend the record or remove it")
    if len(value) > LONGEST_TEXT:
        raise Fault(
            f"{record}: {key} has {len(value):,} characters, more than the {LONGEST_TEXT:,} that a turn may "
            "have; shorten it or remove the record"
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise Fault(
            f"{record}: {key} holds half a surrogate pair ({show(value)}), which is not text; mend it or "
            "remove the record"
        ) from None
    if not empty and not value.strip():
        raise Fault(f"{record}: {key} is empty; write one or remove the record")
    return value


def name_of(value: Any, record: str, key: str = "id") -> str:
    """An id given as text or as a whole number."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if len(text(value, record, key)) > LONGEST_ID:
        raise Fault(f"{record}: {key} has {len(value):,} characters; give the record an id of at most {LONGEST_ID}")
    return value


def picture(value: Any, images: Path | None, record: str, key: str = "image") -> Path | bytes:
    """The picture that a record points at: a file inside ``images``, or encoded bytes.

    Takes a path, bytes, base64 (with or without a ``data:`` prefix), a ``{"bytes", "path"}`` object, or a list with
    one of these. A path is looked for in ``images`` as it is and then without its first folder, its first two and so
    on down to its basename, because released files carry the folders of the machine that wrote them; COCO's pictures
    are also found under the names of its other years.

    Raises:
        MissingImage: no such file.
        Fault: the path leaves ``images`` (``..``, absolute, through a link) or is not a path at all.
    """
    if isinstance(value, list):
        if len(value) != 1:
            raise Fault(f"{record}: {key} must hold one picture, found {len(value)}; split the record or remove it")
        value = value[0]
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes | bytearray):
        if not value:
            raise Fault(f"{record}: {key} is an empty picture; remove the record")
        return bytes(value)
    if isinstance(value, str):
        decoded = _base64(value)
        if decoded is not None:
            return decoded
    return image_file(text(value, record, key), images, record, key)


def _base64(value: str) -> bytes | None:
    body = value
    if value.startswith("data:"):
        body = value.partition(",")[2]
    elif len(value) < 64 or not re.fullmatch(r"[A-Za-z0-9+/\s]+=*\s*", value):
        return None
    try:
        decoded = base64.b64decode(body, validate=False)
    except binascii.Error:
        return None
    return decoded if decoded.startswith(SIGNATURES) else None


def image_file(name: str, images: Path | None, record: str, key: str = "image") -> Path:
    """The file that ``name`` means inside the folder ``images`` (see :func:`picture`)."""
    if images is None:
        raise Fault(f"{record}: {key} is the path {show(name)} but no image folder was given; give one")
    if "\0" in name or len(name) > 1024 or name.count("/") > 32:
        what = "a NUL character" if "\0" in name else f"{len(name):,} characters and {name.count('/')} folders"
        raise Fault(f"{record}: {key} is a path with {what} ({show(name)}); mend it or remove the record")
    root = os.path.realpath(images)
    posix = PurePosixPath(name)
    outside = ".." in posix.parts or ".." in PureWindowsPath(name).parts or bool(PureWindowsPath(name).drive)
    if posix.is_absolute():
        outside = outside or not _within(os.path.realpath(name), root)
    if outside:
        raise Fault(f"{record}: {key} {show(name)} leads out of the image folder {images}; give a path inside it")
    names = [Path(*posix.parts[start:]) for start in range(len(posix.parts))]
    for candidate in (Path(images) / name for name in names + _other_coco_names(posix.name)):
        try:
            there = candidate.is_file()
        except OSError:  # a part of the name is longer than the file system allows
            there = False
        if there:
            if not _within(os.path.realpath(candidate), root):
                raise Fault(
                    f"{record}: {key} {show(name)} is a link that leads out of the image folder {images}; "
                    "copy the picture into the folder"
                )
            return candidate
    raise MissingImage(record, name)


def _other_coco_names(name: str) -> list[str]:
    """The same picture of COCO in other years' naming: 2014's names carry the split, 2017's only the number."""
    match = re.fullmatch(r"(?:COCO_(?:train|val)2014_)?(\d{12}\.jpg)", name)
    if not match:
        return []
    return [other + match.group(1) for other in ("COCO_train2014_", "COCO_val2014_", "")]


def _within(real: str, root: str) -> bool:
    return os.path.commonpath([real, root]) == root
