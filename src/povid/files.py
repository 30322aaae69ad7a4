"""Atomic writes: a file or folder exists complete or not at all.

Content is forced to disk before it is renamed to its final name, and the name is forced to disk afterwards, so that
neither a kill nor a power cut leaves an incomplete file under that name.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from povid.fault import Fault


@contextmanager
def draft(place: Path, *, replace: bool = True) -> Iterator[Path]:
    """Yield a path beside ``place``; a file or folder written there becomes ``place`` when the block ends.

    The parent folder is made. After an exception the draft is removed and ``place`` is unchanged. A folder that already
    exists at ``place`` is replaced; with ``replace=False`` it stays and the draft is removed, so that of several
    processes that write the same folder the first one wins.
    """
    place = Path(place)
    place.parent.mkdir(parents=True, exist_ok=True)
    beside = place.with_name(f".{place.name}.{os.getpid()}.part")
    remove(beside)
    try:
        yield beside
        for file in files_in(beside):
            sync(file)
        if replace and place.is_dir():
            remove(place)
        try:
            os.replace(beside, place)
        except OSError:
            if replace or not place.is_dir():
                raise
            remove(beside)
        sync(place.parent)
    except BaseException:
        remove(beside)
        raise


def write_bytes(file: Path, content: bytes) -> Path:
    """Write a file atomically. Returns ``file``. Raises IsADirectoryError rather than replace a folder."""
    if Path(file).is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(file))
    with draft(file) as beside:
        beside.write_bytes(content)
    return Path(file)


def write_text(file: Path, text: str) -> Path:
    """Write a UTF-8 file atomically, line ends unchanged; lone surrogates become question marks. Returns ``file``."""
    return write_bytes(file, text.encode("utf-8", "replace"))


def write_json(file: Path, value: Any) -> Path:
    """Write a value as indented JSON, atomically. Returns ``file``."""
    return write_text(file, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(file: Path, kind: type[Any], cure: str, keys: Collection[str] = ()) -> Any:
    """The value in a file that this project wrote: a ``kind``, with ``keys`` if it is a mapping.

    Raises:
        Fault: the file is unreadable, damaged or holds something else; the sentence ends with ``cure``.
    """
    try:
        value: Any = json.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise Fault(f"{file} cannot be read ({error.strerror}); {cure}") from None
    except (ValueError, RecursionError):
        raise Fault(f"{file} is damaged: it is not JSON; {cure}") from None
    if not isinstance(value, kind):
        raise Fault(f"{file} is damaged: it holds a {type(value).__name__} and not a {kind.__name__}; {cure}")
    if missing := [key for key in keys if key not in value]:
        raise Fault(f"{file} is damaged: {', '.join(missing)} missing; {cure}")
    return value


class Readable(Protocol):
    """Something whose content is elsewhere."""

    def read(self) -> bytes: ...


def digest(source: Path | bytes | Readable, whole: int | None = None) -> str:
    """Sixteen hexadecimal digits that name the content of a file, of bytes, or of what can be read.

    Of a file of more than ``whole`` bytes only the size and the first ``whole`` bytes count; None counts all of it.
    """
    if not isinstance(source, Path):
        return hashlib.sha256(source if isinstance(source, bytes) else source.read()).hexdigest()[:16]
    found = hashlib.sha256()
    with source.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        left = size if whole is None else min(size, whole)
        while left > 0 and (block := file.read(min(left, 2**22))):
            found.update(block)
            left -= len(block)
    if whole is not None and size > whole:
        found.update(str(size).encode())
    return found.hexdigest()[:16]


def remove(place: Path) -> None:
    """Remove a file, or a folder with all its content; do nothing if it does not exist."""
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)


def files_in(place: Path) -> list[Path]:
    """A file itself, or all files below a folder, sorted."""
    return sorted(file for file in place.rglob("*") if file.is_file()) if place.is_dir() else [place]


def sync(place: Path) -> None:
    """Force a file, or the names in a folder, to disk."""
    handle = os.open(place, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
