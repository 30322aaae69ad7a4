"""Pictures that stay in the file that holds their records, and what is kept to find them there again.

A parquet file compresses many pictures together, so that none can be read alone. On first use it is copied into an
Arrow file (:func:`arrow_copies`), where every picture lies at a place of its own. JSON is read where it is.
"""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
import json
import logging
import multiprocessing
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field
from io import FileIO
from itertools import pairwise
from pathlib import Path
from typing import Any

from filelock import FileLock

from povid import files
from povid.fault import Fault
from povid.machine import cores

log = logging.getLogger(__name__)

BASE64 = re.compile(r"[A-Za-z0-9+/\s]+=*")  # without what stands behind it
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"BM", b"RIFF", b"II*\x00", b"MM\x00*")
LONG = 2**28  # bytes of a file that takes a second to read
ROWS = 64  # records in memory at once
# In base64, a picture begins with one of these.
STARTS = ("data:", *(base64.b64encode(sign).decode()[: len(sign) * 4 // 3] for sign in SIGNATURES))


@dataclass(frozen=True, slots=True)
class Source:
    """A file as it was when it was read."""

    path: str
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, path: Path) -> Source:
        found = path.stat()
        return cls(str(path), found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)

    @property
    def key(self) -> str:
        """What names this state of the file, wherever the working folder is."""
        parts = (os.path.realpath(self.path), self.inode, self.size, self.mtime_ns, self.ctime_ns)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Stored:
    """An encoded picture (JPEG, PNG ...) that lies in ``source``, from ``offset`` on.

    Without ``keys`` the ``size`` bytes there are the picture. With them they are a JSON value, in which the ``keys``
    lead to the picture in base64.
    """

    source: Source
    offset: int
    size: int
    keys: tuple[str | int, ...] = ()
    digest: str = field(default="", compare=False)  # of the picture; "" where it is not known yet

    def read(self) -> bytes:
        """The picture's bytes.

        Raises:
            Fault: the file was changed or removed.
        """
        file = _opened(self.source)  # a name of its own keeps it open
        raw = os.pread(file.fileno(), self.size, self.offset)
        if not self.keys:
            return raw
        try:
            found: Any = json.loads(raw)
            for key in self.keys:
                found = found[key]
            return decoded(found) or b""
        except (ValueError, LookupError, TypeError):
            raise _changed(self.source) from None


Picture = Path | bytes | Stored


def picture_bytes(picture: Picture) -> bytes:
    """The bytes of a picture, wherever it is."""
    if isinstance(picture, Stored):
        return picture.read()
    return picture if isinstance(picture, bytes) else picture.read_bytes()


class Base64(str):
    """A text in a JSON file that may be a picture, and where it stands there."""

    place: tuple[Source, int, int, tuple[str | int, ...]]

    def stored(self, picture: bytes) -> Stored:
        return Stored(*self.place, files.digest(picture))


def mark(value: Any, source: Source, offset: int, size: int) -> Any:
    """``value``, the JSON value of ``size`` bytes at ``offset``, with every text that may be a picture as Base64."""

    def walk(value: Any, keys: tuple[str | int, ...]) -> Any:
        if isinstance(value, str):
            if len(value) < 64 or not value.startswith(STARTS):
                return value
            found = Base64(value)
            found.place = source, offset, size, keys
            return found
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(inner, str | dict | list):
                value[key] = walk(inner, (*keys, key))
        return value

    return walk(value, ()) if isinstance(value, dict | list) else value


def decoded(value: str) -> bytes | None:
    """The picture that a text in base64 holds, with or without a ``data:`` prefix; None if it holds none."""
    body = value
    if value.startswith("data:"):
        body = value.partition(",")[2]
    elif len(value) < 64 or not BASE64.fullmatch(value.rstrip()):
        return None
    try:
        found = base64.b64decode(body, validate=False)
    except binascii.Error:
        return None
    return found if found.startswith(SIGNATURES) else None


@functools.lru_cache(maxsize=64)
def _opened(source: Source) -> FileIO:
    """The file, open: a copy that is replaced or removed meanwhile can be read to the end of the run."""
    try:
        file = FileIO(source.path)
    except OSError:
        raise _changed(source) from None
    found = os.fstat(file.fileno())
    if (found.st_ino, found.st_size, found.st_mtime_ns) != (source.inode, source.size, source.mtime_ns):
        file.close()
        raise _changed(source)
    return file


def _changed(source: Source) -> Fault:
    return Fault(f"{source.path} was changed or removed while its pictures were in use; start again to read it anew")


# --- Arrow files ---


def cache() -> Path:
    """The folder for what is made from data files on first use, in that of the `datasets` library."""
    from huggingface_hub.constants import HF_HOME

    return Path(os.environ.get("HF_DATASETS_CACHE", Path(HF_HOME, "datasets"))).expanduser() / "povid"


def arrow_copies(shards: Sequence[Path]) -> Iterator[Path | None]:
    """The Arrow copy of each parquet file, made if the file is new or was changed; None for one without pictures.

    Raises:
        Fault: there is no room for a copy.
        pyarrow.ArrowException, OSError: a file is not valid.
    """
    new = [shard for shard in shards if _is_new(shard)]
    size = sum(shard.stat().st_size for shard in new)
    if size >= LONG:
        log.info("%.1f GiB of records are copied to %s, once, to read picture by picture", size / 2**30, cache())
    with ExitStack() as stack:
        jobs = {}
        if new:  # in processes, whose memory is given back
            processes = min(len(new), cores())
            pool = stack.enter_context(ProcessPoolExecutor(processes, multiprocessing.get_context("fork")))
            stack.callback(pool.shutdown, cancel_futures=True)
            jobs = {shard: pool.submit(_copy, shard) for shard in new}
        for shard in shards:
            place = _place(shard)
            if shard in jobs:
                try:
                    jobs[shard].result()
                except BrokenProcessPool:
                    raise Fault(
                        f"a process that copied {shard} died, most likely because memory ran out; free some and start "
                        "again"
                    ) from None
            yield place


def _place(parquet: Path) -> Path | None:
    """Where the copy of a parquet file is, or will be; None if the file holds no pictures."""
    import pyarrow.parquet

    if not any(holds_bytes(field.type) for field in pyarrow.parquet.read_schema(parquet)):
        return None
    return cache() / f"{parquet.stem[:60]}-{_owner(parquet)}-{Source.of(parquet).key}.arrow"


def _owner(parquet: Path) -> str:
    """What the names of all copies of a file have in common."""
    return hashlib.sha256(os.path.realpath(parquet).encode()).hexdigest()[:8]


def _is_new(parquet: Path) -> bool:
    import pyarrow

    try:
        place = _place(parquet)
        return place is not None and not place.exists()
    except (pyarrow.ArrowException, OSError):  # said when it is the file's turn
        return False


def _copy(parquet: Path) -> None:
    """Copy a parquet file, and keep the digests of its pictures."""
    import pyarrow
    import pyarrow.parquet

    place, owner = _place(parquet), _owner(parquet)
    # Pages are read one after the other: a row group may be the whole file.
    with pyarrow.parquet.ParquetFile(parquet, buffer_size=2**20, pre_buffer=False) as file:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(place.with_name(f".{owner}.lock")):
                if place.exists():
                    return
                with files.draft(place) as beside, pyarrow.ipc.new_stream(str(beside), file.schema_arrow) as writer:
                    for batch in file.iter_batches(batch_size=ROWS, use_threads=False):
                        writer.write_batch(batch)
                for old in place.parent.iterdir():  # of the file as it was before, or of a copy that was killed
                    if f"-{owner}-" in old.name and not old.name.startswith(place.stem):
                        old.unlink(missing_ok=True)
                digests([picture for row in arrow_rows(place) for picture in _stored(row)])
        except OSError as error:
            if error.errno is None:  # of Arrow, about the parquet file
                raise
            raise Fault(
                f"{parquet} holds pictures and cannot be copied to {place.parent} ({error.strerror}), where they can "
                f"be read one by one; make room there for about {parquet.stat().st_size / 2**30:.1f} GiB, or name "
                "another folder in HF_DATASETS_CACHE"
            ) from None


def _stored(value: Any) -> Iterator[Stored]:
    """Every picture in a record."""
    if isinstance(value, Stored):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _stored(inner)


def holds_bytes(kind: Any) -> bool:
    """Whether an Arrow type has bytes in it, which may be pictures."""
    from pyarrow import types

    if types.is_struct(kind):
        return any(holds_bytes(kind.field(number).type) for number in range(kind.num_fields))
    if types.is_list(kind) or types.is_large_list(kind):
        return holds_bytes(kind.value_type)
    return _bytes(kind)


def arrow_rows(file: Path) -> Iterator[dict[str, Any]]:
    """The records of an Arrow stream, with bytes that are not empty as :class:`Stored`."""
    import pyarrow

    source = Source.of(file)
    with pyarrow.memory_map(str(file)) as mapped:
        start = mapped.read_buffer(1).address
        mapped.seek(0)
        for batch in pyarrow.ipc.open_stream(mapped):
            columns = [_values(column, source, start) for column in batch.columns]
            for row in zip(*columns):
                yield dict(zip(batch.schema.names, row))


def _bytes(kind: Any) -> bool:
    from pyarrow import types

    return types.is_binary(kind) or types.is_large_binary(kind)


def _values(array: Any, source: Source, start: int) -> list[Any]:
    """An array's values as Python has them; ``start`` is the address at which the file's first byte is mapped."""
    import numpy as np
    from pyarrow import types

    kind = array.type
    if not holds_bytes(kind):
        return array.to_pylist()
    if types.is_struct(kind):
        names = [kind.field(number).name for number in range(kind.num_fields)]
        found = zip(*(_values(array.field(number), source, start) for number in range(kind.num_fields)))
        values: Any = (dict(zip(names, row)) for row in found)
    elif not _bytes(kind):
        inner, ends = _values(array.values, source, start), array.offsets.to_pylist()
        values = (inner[begin:end] for begin, end in pairwise(ends))
    elif not len(array):
        return []
    else:
        _, offsets, body = array.buffers()
        places = np.frombuffer(offsets, np.int64 if types.is_large_binary(kind) else np.int32)
        ends = places[array.offset : array.offset + len(array) + 1].tolist()
        first = body.address - start if body is not None else 0
        if not 0 <= first + ends[-1] <= source.size:
            raise OSError("its bytes are compressed")
        values = (Stored(source, first + begin, end - begin) if end > begin else b"" for begin, end in pairwise(ends))
    return [None if null else value for null, value in zip(array.is_null().to_pylist(), values)]


# --- digests ---


def file_digest(file: Path) -> str:
    """What names the content of a file (:func:`povid.files.digest`); of a large one, read once and kept."""
    source = Source.of(file)
    if source.size < LONG:
        return files.digest(file)
    note = cache() / f"{file.stem}-{source.key}.txt"
    if not note.exists():
        files.write_text(note, files.digest(file))
    return note.read_text()


def digests(pictures: Sequence[Stored]) -> list[str]:
    """What names the content of pictures (:func:`povid.files.digest`); of pictures in Arrow, read once and kept."""
    found = {picture: picture.digest for picture in pictures}
    unknown: dict[Source, list[Stored]] = {}
    for picture, known in found.items():
        if not known:
            unknown.setdefault(picture.source, []).append(picture)
    for source, asked in unknown.items():
        note = cache() / f"{Path(source.path).stem}-{source.key}.json"
        kept = json.loads(note.read_text()) if note.exists() else {}
        if new := [picture for picture in asked if str(picture.offset) not in kept]:
            with ThreadPoolExecutor(8) as threads:
                made = threads.map(files.digest, new)
                kept.update(zip((str(picture.offset) for picture in new), made))
            files.write_json(note, kept)
        found |= {picture: kept[str(picture.offset)] for picture in asked}
    return [found[picture] for picture in pictures]
