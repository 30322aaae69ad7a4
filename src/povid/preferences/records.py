"""Records of a JSON, JSON Lines, CSV or parquet file or of a hub's data set, and checked values from them.

Everything here reads files that somebody else made: every invalid value raises a Fault that says what was found.
Records are read one after the other and their pictures stay in the file (:mod:`povid.preferences.stored`).
"""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import json
import multiprocessing
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from povid import files
from povid.fault import Fault
from povid.preferences.stored import ROWS, Source, Stored, arrow_copies, arrow_rows, mark
from povid.preferences.triple import Image, Triple, Turn

Built = TypeVar("Built")
IMAGE_MARKER = "<image>"
LONGEST_TEXT = 100_000  # characters in one turn; no model reads more
LONGEST_ID = 300
_SPACE = re.compile(r"[ \t\n\r]*")
BLOCK = 2**20  # bytes of a JSON list that are read at once
HUB = re.compile(r"hf:/+(?:datasets/)?([^/@]+/[^/@]+)(?:@([^/@]+))?/?")  # a Path makes one slash of two

_shown = reprlib.Repr()
_shown.maxstring = _shown.maxother = 60
_shown.maxdict = _shown.maxlist = 4
_shown.maxlevel = 2


class MissingPicture(Fault):
    """A record's picture is not in the image folder; :func:`gather` reports all of them in one sentence."""

    def __init__(self, record: str, name: str):
        super().__init__(f"{record}: the picture {show(name)} is not in the image folder")
        self.name = name


class Skipped(list[str]):
    """Takes a sentence for each record that cannot be used, and in ``pictures`` the names of pictures that are missing.

    As in any list, a missing picture is a sentence too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pictures: list[str] = []


def show(value: Any) -> str:
    """Any value as an error message shows it: short and on one line."""
    value = value.read() if isinstance(value, Stored) else value
    return _shown.repr(value).encode("utf-8", "backslashreplace").decode()


def gather(
    path: Path,
    images: Path | None,
    skipped: list[str] | None,
    build: Callable[[Mapping[str, Any], Path | None, str], Iterable[Built]],
) -> list[Built]:
    """Collect what ``build(record, images, place)`` makes of every record of a file.

    Args:
        path: a .json, .jsonl, .csv or .parquet file, a folder of parquet shards, or a data set of the hub, as
            hf://datasets/OWNER/NAME or hf://datasets/OWNER/NAME@REVISION.
        images: folder of the pictures; None if the records carry their pictures.
        skipped: takes one sentence for each record that cannot be used; None raises the first one instead, or, once
            the file is read, a sentence that counts the missing pictures.

    Raises:
        Fault: the file or the image folder cannot be read, or, without ``skipped``, a record cannot be used.
    """
    if HUB.fullmatch(str(path)):
        images = None
    if images is not None and not Path(images).is_dir():
        raise Fault(f"image folder {images} does not exist; give the folder that holds the pictures of {path}")
    built: list[Built] = []
    missing: list[str] = []
    sentences: list[str] = []
    for place, record in records(path):
        try:
            if isinstance(record, Fault):
                raise record
            built.extend(build(mapping(record, "record"), images, place))
        except Fault as fault:
            sentence = str(fault) if str(fault).startswith(place) else f"{place}: {fault}"
            if skipped is not None:
                sentences.append(sentence)
                if isinstance(skipped, Skipped) and isinstance(fault, MissingPicture):
                    skipped.pictures.append(fault.name)
            elif isinstance(fault, MissingPicture):
                missing.append(fault.name)
            else:
                raise Fault(sentence) from None
    if skipped is not None:
        skipped += sentences
    if missing:
        first = ", ".join(show(name) for name in missing[:3])
        raise Fault(
            f"{path}: {len(missing)} {'picture is' if len(missing) == 1 else 'pictures are'} not in {images} (first: "
            f"{first}); add the missing files, give another image folder, or skip such "
            "records (data.skip_bad=true)"
        )
    return built


def records(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (place, record) for every record of ``path``, a file by its suffix or a folder of parquet shards.

    ``place`` names the file and the entry (list entries count from 0, lines from 1). A line that is not JSON is yielded
    as the Fault that describes it, so that a reader can skip it.

    Raises:
        Fault: the file is missing, empty, of an unknown kind or unreadable.
    """
    found = False
    for place, record in _hub(str(path)) if HUB.fullmatch(str(path)) else _local(Path(path)):
        found = True
        yield place, record
    if not found:
        raise Fault(f"{path} holds no records; give a file with at least one")


def sources(place: str) -> list[Path]:
    """The files behind a name of :func:`records`; none where there is nothing."""
    if HUB.fullmatch(place):
        return hub_files(place)
    return files.files_in(Path(place)) if Path(place).exists() else []


def _local(path: Path) -> Iterator[tuple[str, Any]]:
    if not path.exists():
        raise Fault(f"{path} does not exist; give the file that holds the records")
    if path.is_dir():
        shards = sorted(path.glob("*.parquet"))
        if not shards:
            raise Fault(f"{path} is a folder without .parquet files; give a .json, .jsonl, .csv or .parquet file")
        yield from _parquet(*shards)
    elif path.suffix.lower() in _READERS:
        yield from _READERS[path.suffix.lower()](path)
    else:
        raise Fault(
            f"{path} ends in {path.suffix or 'no suffix'!r}; records are read from .json, .jsonl, .csv "
            "and .parquet files"
        )


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    index = 0
    try:
        for record in _entries(path):
            yield f"{path}, entry {index}", record
            index += 1
        return
    except (ValueError, RecursionError):  # not a list, or damaged: read whole, which says what is wrong with it
        value = parse_json(path)
    except OSError as error:
        raise Fault(f"{path} cannot be read ({error.strerror}); check the file and its permissions") from None
    if not isinstance(value, list):
        raise Fault(f"{path} must be a JSON list of records, found {_kind(value)}; put the records in one list")
    for number in range(index, len(value)):
        yield f"{path}, entry {number}", value[number]


def _entries(path: Path) -> Iterator[Any]:
    """The entries of a JSON list, of which no more than the next one is in memory.

    Raises:
        ValueError: the file is not a JSON list.
        RecursionError: an entry nests too deeply.
    """
    source = Source.of(path)
    scan: Callable[[str, int], tuple[Any, int]] = json.JSONDecoder(parse_constant=_no_constant).raw_decode
    with open(path, "rb") as file:
        bom = len(codecs.BOM_UTF8) if file.peek(3).startswith(codecs.BOM_UTF8) else 0
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        text, at, passed, size, ended = "", 0, bom, BLOCK, False  # passed: bytes before the text

        def more() -> None:
            nonlocal text, at, passed, size, ended
            passed += len(text[:at].encode())
            block = file.read(size)
            ended = len(block) < size
            text, at, size = text[at:] + decoder.decode(block, ended), 0, 2 * size

        def sign() -> str:
            """The next character that is not white space; "" at the end."""
            nonlocal at
            while True:
                at = _SPACE.match(text, at).end()
                if at < len(text) or ended:
                    return text[at : at + 1]
                more()

        if sign() != "[":
            raise ValueError("no list")
        at += 1
        following = sign()
        while following != "]":
            try:
                value, end = scan(text, at)
            except (ValueError, RecursionError):
                end = len(text)
                if ended:
                    raise
            if end == len(text) and not ended:  # it may be cut here
                more()
                continue
            start = passed + len(text[:at].encode())
            value = mark(value, source, start, len(text[at:end].encode()))
            at, size = end, BLOCK
            yield value
            following = sign()
            if following == ",":
                at += 1
                if sign() == "]":
                    raise ValueError("a comma ends the list")
            elif following != "]":
                raise ValueError("no comma")
        at += 1
        if sign():
            raise ValueError("more than a list")


def parse_json(path: Path) -> Any:
    """The value in a JSON file. Raises Fault when it cannot be read."""
    return _parse(_decode(_bytes(path), str(path)), str(path))


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        source, offset = Source.of(path), 0
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                start, offset = offset, offset + len(line)
                if not line.strip():
                    continue
                place = f"{path}, line {number}"
                try:
                    bom = len(codecs.BOM_UTF8) if line.startswith(codecs.BOM_UTF8) else 0
                    yield place, mark(_parse(_decode(line, place), place), source, start + bom, len(line) - bom)
                except Fault as fault:
                    yield place, fault
    except OSError as error:
        raise Fault(f"{path} cannot be read ({error.strerror}); check the file and its permissions") from None


def _csv(path: Path) -> Iterator[tuple[str, Any]]:
    text = _decode(_bytes(path), str(path))
    try:
        rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        for index, row in enumerate(rows):
            yield f"{path}, row {index}", {key: value for key, value in row.items() if key is not None and value}
    except csv.Error as error:
        raise Fault(f"{path} is not a CSV table ({error}); fix it or use JSON Lines instead") from None


def _parquet(*shards: Path) -> Iterator[tuple[str, Any]]:
    """The records of shards, one after the other; pictures in them are read from Arrow copies."""
    import pyarrow

    copies = arrow_copies(shards)
    for path in shards:
        try:
            copy = next(copies)
            for index, record in enumerate(arrow_rows(copy) if copy else _parquet_rows(path)):
                yield f"{path}, row {index}", record
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError, OverflowError) as error:
            raise Fault(f"{path} is not a valid parquet file ({one_line(error)}); download or write it again") from None


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet

    for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=ROWS):
        yield from batch.to_pylist()


def _hub(name: str) -> Iterator[tuple[str, Any]]:
    """The records of a data set's split "train", in the memory-mapped files that the `datasets` library makes."""
    repository = HUB.fullmatch(name).group(1)
    for index, record in enumerate(itertools.chain.from_iterable(map(arrow_rows, hub_files(name)))):
        yield f"hf://datasets/{repository}, row {index}", record


def hub_files(name: str) -> list[Path]:
    """The Arrow files of a hub's data set; downloaded and written once, into the cache of the `datasets` library.

    Raises:
        Fault: there is no such data set, or it cannot be downloaded.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as other:  # whose memory is given back
        return other.submit(_load, *HUB.fullmatch(name).groups()).result()


def _load(repository: str, revision: str | None) -> list[Path]:
    import datasets

    try:
        found = datasets.load_dataset(repository, revision=revision, split="train")
    except Exception as error:  # whatever the network, the hub and its files do
        raise Fault(
            f"hf://datasets/{repository} cannot be loaded ({type(error).__name__}: {one_line(error)}); check the name, "
            "that it has a split train, and the network, or download its files and name their folder"
        ) from None
    return [Path(file["filename"]) for file in found.cache_files]


_READERS: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
    ".json": _json,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".csv": _csv,
    ".parquet": _parquet,
}


def one_line(error: Exception) -> str:
    """Another library's error message on one line, at most 160 characters."""
    return " ".join(str(error).split())[:160] or type(error).__name__


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise Fault(f"{path} cannot be read ({error.strerror}); check the file and its permissions") from None


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
        cure = "if it holds one record per line, name it .jsonl" if lines else "fix it or download it again"
        raise Fault(f"{place} is not valid JSON ({where}); {cure}") from None
    except RecursionError:
        raise Fault(f"{place} nests lists or objects too deeply to be records; fix it or download it again") from None
    except ValueError as error:  # NaN and Infinity from _no_constant, integers of thousands of digits from Python
        raise Fault(f"{place} holds a number that JSON does not allow ({one_line(error)}); replace it") from None


def _no_constant(name: str) -> None:
    raise ValueError(name)


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", type(None): "null", bool: "true or false"}
    kinds |= {Stored: "bytes"}
    return kinds.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


# --- checked values of one record; `record` is what a Fault calls it ---


def mapping(value: Any, record: str, key: str = "") -> Mapping[str, Any]:
    """``value`` as an object."""
    if not isinstance(value, Mapping):
        raise Fault(
            f"{record}: {key or 'the record'} must be an object, found {_kind(value)} {show(value)}; "
            "fix the record or remove it"
        )
    return value


def listing(value: Any, record: str, key: str) -> list[Any]:
    """``value`` as a list with at least one entry."""
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else f"{_kind(value)} {show(value)}"
        raise Fault(f"{record}: {key} must be a list with entries, found {found}; fix the record or remove it")
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
    """``value`` as text: valid Unicode, at most :data:`LONGEST_TEXT` characters and, unless ``empty``, not blank."""
    if not isinstance(value, str):
        raise Fault(f"{record}: {key} must be text, found {_kind(value)} {show(value)}; fix the record or remove it")
    if len(value) > LONGEST_TEXT:
        raise Fault(
            f"{record}: {key} has {len(value):,} characters, more than the {LONGEST_TEXT:,} that a turn may "
            "have; shorten it or remove the record"
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise Fault(
            f"{record}: {key} holds half a surrogate pair ({show(value)}), which is not text; fix it or "
            "remove the record"
        ) from None
    if not empty and not value.strip():
        raise Fault(f"{record}: {key} is empty; fill it in or remove the record")
    return value


def name_of(value: Any, record: str, key: str = "id") -> str:
    """An id, given as text or as a whole number."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if len(text(value, record, key)) > LONGEST_ID:
        raise Fault(f"{record}: {key} has {len(value):,} characters; give the record an id of at most {LONGEST_ID}")
    return value


def label(record: Mapping[str, Any], key: str = "id") -> str:
    """What error messages call a record."""
    return f"record {show(record[key])}" if record.get(key) is not None else f"record without {key}"


def number_of(place: str) -> str:
    """The number of an entry or a line, which stands in for a missing id."""
    return place.rpartition(" ")[2]


# --- conversations ---


def turns_of(value: Any, record: str, key: str, *, placeholder: bool = False) -> tuple[Turn, ...]:
    """LLaVA's ``[{"from": "human" | "gpt", "value": text}]`` as turns without image markers.

    With ``placeholder`` the last value may be empty.
    """
    turns = []
    value = listing(value, record, key)
    for number, turn in enumerate(value):
        place = f"{key}[{number}]"
        turn = mapping(turn, record, place)
        speaker = member(turn, "from", record, place)
        if speaker not in ("human", "gpt"):
            raise Fault(
                f"{record}: {place}.from must be 'human' or 'gpt', found {show(speaker)}; fix the record or remove it"
            )
        last = number == len(value) - 1
        said = text(member(turn, "value", record, place), record, f"{place}.value", empty=placeholder and last)
        turns.append(
            Turn("user", without_marker(said, record, f"{place}.value"))
            if speaker == "human"
            else Turn("assistant", said.replace(IMAGE_MARKER, ""))
        )
    return tuple(turns)


def without_marker(question: str, record: str, key: str) -> str:
    """A question without the image marker."""
    if IMAGE_MARKER in question:
        question = question.replace(IMAGE_MARKER, "").strip()
    if not question.strip():
        raise Fault(f"{record}: {key} is empty apart from the image marker; write a question or remove the record")
    return question


def one_round(
    id: str, image: Image, question: str, preferred: str, dispreferred: str, source: str, meta: Mapping[str, Any]
) -> Triple:
    """A triple of one question and its two answers."""
    asked = Turn("user", question)
    return Triple(
        id, image, (asked, Turn("assistant", preferred)), (asked, Turn("assistant", dispreferred)), source, meta
    )
