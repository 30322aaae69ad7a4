"""Download official files: watched, checked, resumed where an attempt broke off, and recorded."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import http.client
import json
import lzma
import os
import shutil
import socket
import ssl
import struct
import threading
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from povid.fault import Fault
from povid.fetching.source import Source
from povid.files import remove, sync, write_json

BLOCK = 1 << 20  # bytes
PATIENCE = 300.0  # seconds in which a block must come, and before the first all headers, redirections included
RECORD = "fetched.json"  # in the data folder: address, size and sha256 of what came


Refusal = Callable[[urllib.error.HTTPError], str | None]
"""What a server means by an error, as a sentence with its cure; None where it says nothing of its own."""


def fetch(
    sources: Sequence[Source],
    data: Path,
    *,
    headers: Mapping[str, str] | None = None,
    refusal: Refusal | None = None,
    tries: int = 5,
    pause: float = 1.0,
) -> list[Path]:
    """Download files into ``data``; those that are there and recorded are left alone.

    A download that breaks off is kept as FILE.part and resumed; a file gets its name only when it is complete and
    checked. Its address, size and sha256 are recorded in ``data/fetched.json``. A file that somebody put there is taken
    if it is the official one, as far as that is known, and never replaced.

    Args:
        headers: sent to the addresses themselves and to none that they redirect to, such as a login.
        refusal: explains an address that answers with an error.
        tries, pause: how often an address is tried, and how many seconds pass before the second attempt.

    Raises:
        Fault: no connection after ``tries`` attempts, an address that answers with an error or too slowly, a wrong size
            or hash, a length that is nowhere stated, a full disk, another file under the same name, an archive that is
            damaged, encrypted or would write outside ``data``, or another download into the same folder.
    """
    data = Path(data)
    try:
        data.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Fault(f"{data} cannot be created ({error.strerror}); choose another folder") from error
    with _alone(data):
        known = recorded(data)
        needed = [source for source in sources if not _is_recorded(source, data, known)]
        _make_sure_of_room(needed, data)
        for source in needed:
            file = data / source.file
            if file.is_file() and source.file not in known:
                size, digest = _found(source, file)
            else:
                size, digest = _download(source, file, headers or {}, refusal, tries, pause)
            if source.unpack:
                _unpack(source, file, data / source.unpack)
                file.unlink()
            known[source.file] = {"url": source.url, "size": size, "sha256": digest, **source.origin}
            write_json(data / RECORD, known)
    return list(dict.fromkeys(data / (source.unpack or source.file) for source in sources))


def recorded(data: Path) -> dict[str, dict[str, Any]]:
    """File → address, size, sha256 and origin of what was downloaded into a folder, or of what its archive held.

    Raises:
        Fault: the record is damaged.
    """
    record = data / RECORD
    try:
        known = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
        return {str(name): dict(entry) for name, entry in known.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise Fault(f"{record} is not a record of downloads ({error}); remove it and run again") from error


def is_complete(source: Source, data: Path) -> bool:
    """Whether a file, or what an archive holds, was downloaded into a folder and is still there."""
    return _is_recorded(source, data, recorded(data))


def link(source: Source, there: Path, data: Path) -> None:
    """Give ``data`` the pictures of an archive that was unpacked in ``there``: as links, which take no room.

    Where the file system has no hard links, the pictures are copied.
    """
    assert source.unpack is not None
    entry = recorded(there)[source.file]
    for file in (there / source.unpack).rglob("*"):
        place = data / source.unpack / file.relative_to(there / source.unpack)
        if file.is_file() and not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            half = place.with_name(place.name + ".part")
            remove(half)
            try:
                os.link(file, half)
            except OSError:
                shutil.copyfile(file, half)
            os.replace(half, place)
    with _alone(data):
        write_json(data / RECORD, recorded(data) | {source.file: entry})


@contextlib.contextmanager
def _alone(data: Path) -> Iterator[None]:
    """Inside, no other process downloads into the folder: two would write the same .part."""
    handle = os.open(data, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise Fault(
            f"another process is downloading into {data}; wait until it has finished, then run the same command again"
        ) from None
    finally:
        os.close(handle)


def _is_recorded(source: Source, data: Path, known: Mapping[str, Mapping[str, Any]]) -> bool:
    entry = known.get(source.file, {})
    same = source.sha256 is not None and entry.get("sha256") == source.sha256
    if not same and entry.get("url") != source.url:
        return False
    if source.unpack:
        return (data / source.unpack).is_dir()
    file = data / source.file
    if not file.is_file():
        return False
    if file.stat().st_size != entry.get("size"):
        raise Fault(
            f"{file} has {file.stat().st_size:,} bytes, but {entry.get('size'):,} were downloaded: it was cut or "
            "changed since; move it away and run the same command again"
        )
    return True


def _make_sure_of_room(needed: Sequence[Source], data: Path) -> None:
    """Raise a Fault unless all files of known sizes fit on the disk."""
    parts = ((source, data / f"{source.file}.part") for source in needed if not (data / source.file).is_file())
    lacking = sum((source.size or 0) - (part.stat().st_size if part.is_file() else 0) for source, part in parts)
    free = shutil.disk_usage(data).free
    if lacking > free:
        raise Fault(
            f"{data} needs {lacking / 1e6:,.1f} MB more and {free / 1e6:,.1f} MB are free; make room or choose a "
            "folder on another disk, and run the same command again"
        )


def _found(source: Source, file: Path) -> tuple[int, str]:
    """Size and sha256 of a file that somebody put there; Fault if it is not the official one."""
    size, digest = file.stat().st_size, _sha256(file)
    if source.size not in (None, size) or source.sha256 not in (None, digest):
        raise Fault(
            f"{file} is there already and is not the file of {source.url} ({size:,} bytes with sha256 {digest}, "
            f"expected were {source.size or size:,} bytes with {source.sha256 or 'any'}); move it away and run the "
            "same command again"
        )
    return size, digest


def _download(
    source: Source, file: Path, headers: Mapping[str, str], refusal: Refusal | None, tries: int, pause: float
) -> tuple[int, str]:
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    for attempt in range(tries):
        wait, cure = pause * 2**attempt, "check the network"
        try:
            _transfer(source, part, headers)
            break
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code not in (408, 429):
                raise Fault(
                    (refusal and refusal(error))
                    or f"{source.address} answers {error.code} {error.reason}; open it in a browser, download "
                    f"{file.name} by hand and put it into {file.parent}"
                ) from error
            reason = f"{error.code} {error.reason}"
            if error.code == 429:
                wait, cure = max(wait, retry_after(error.headers.get("Retry-After"))), "wait some minutes"
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError, EOFError) as error:
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        except OSError as error:
            have = part.stat().st_size if part.exists() else 0
            raise Fault(
                f"{part} cannot be written ({error.strerror or error}) after {have:,} bytes, "
                f"{shutil.disk_usage(file.parent).free:,} are free; make room and run the same command again "
                "to resume"
            ) from error
        if attempt + 1 == tries:
            raise Fault(
                f"{source.address} could not be downloaded in {tries} attempts ({reason}); {cure} and run "
                "the same command again to resume"
            )
        time.sleep(wait)
    size, digest = part.stat().st_size, _sha256(part)
    if source.size not in (None, size) or source.sha256 not in (None, digest):
        part.unlink()
        raise Fault(
            f"{source.address} gave {size:,} bytes with sha256 {digest}, expected were "
            f"{source.size or size:,} bytes with {source.sha256 or 'any'}; it was removed. Run the same command again; "
            "if this repeats, the official file has changed"
        )
    os.replace(part, file)  # _transfer has forced its content to disk
    sync(file.parent)
    return size, digest


def retry_after(asked: str | None) -> float:
    """The seconds that a server's header Retry-After asks to wait, a minute at most; 0 where it does not say."""
    return min(float(asked), 60.0) if asked and asked.isdigit() else 0.0


def _transfer(source: Source, part: Path, headers: Mapping[str, str]) -> None:
    """Append what is missing to ``part``; EOFError when the connection ends before the announced length."""
    have = part.stat().st_size if part.exists() else 0
    tag = part.with_name(part.name + ".tag")  # which version of the file the part belongs to
    request = urllib.request.Request(source.address, headers={"User-Agent": "povid"})
    for name, value in headers.items():
        request.add_unredirected_header(name, value)
    if have:
        request.add_header("Range", f"bytes={have}-")
        if tag.is_file() and tag.read_text():
            request.add_header("If-Range", tag.read_text())
    with _Watch() as watch:
        try:
            answer = watch.open(request)
        except urllib.error.HTTPError as error:
            if error.code != 416 or not have:
                raise
            if error.headers.get("Content-Range", "").rpartition("/")[2] == str(have):
                tag.unlink(missing_ok=True)
                return  # it is complete already
            part.unlink()
            raise EOFError("the partial download was of another file") from error
        with answer:
            _receive(source, part, tag, have, answer, watch)
    tag.unlink(missing_ok=True)


def _receive(source: Source, part: Path, tag: Path, have: int, answer: http.client.HTTPResponse, watch: _Watch) -> None:
    """Write the body of an answer to ``part``, of which ``have`` bytes are there, and its version to ``tag``."""
    resumed = answer.status == 206
    if resumed and not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
        part.unlink()
        raise EOFError("the server sent another part than the missing one")
    start = have if resumed else 0
    total = start + answer.length if answer.length is not None else None
    if total is None and not answer.chunked and not (source.size or source.sha256 or source.unpack):
        raise Fault(
            f"{source.address} does not say how long the file is, so that nobody could tell whether it is whole; open "
            f"it in a browser, download {source.file} by hand and put it into {part.parent}"
        )
    if total is not None and total - start > shutil.disk_usage(part.parent).free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    tag.write_text(answer.headers.get("ETag") or "")
    with (
        part.open("ab" if resumed else "wb") as sink,
        tqdm(
            total=total,
            initial=start,
            desc=part.name.removesuffix(".part"),
            unit="B",
            unit_scale=True,
            disable=None,
        ) as bar,
    ):
        for block in _blocks(answer, watch):
            sink.write(block)
            bar.update(len(block))
            if source.size is not None and sink.tell() > source.size:
                break  # and is refused for its size
        sink.flush()
        os.fsync(sink.fileno())
        end = sink.tell()
    if total is not None and end < total:
        raise EOFError(f"the connection ended after {end:,} of {total:,} bytes")


def _blocks(answer: http.client.HTTPResponse, watch: _Watch) -> Iterator[bytes]:
    """The body in blocks; what came before an error is yielded before the error is raised."""
    while True:
        block, failure = bytearray(), None
        watch.wait()
        try:
            while len(block) < BLOCK and (piece := answer.read1(BLOCK - len(block))):
                block += piece
        except (OSError, http.client.HTTPException) as error:
            failure = error
        if block:
            yield bytes(block)
        watch.check(failure)
        if not block:
            return


class _Watch:
    """Opens an address, and closes its connections when what comes next is later than PATIENCE.

    A timeout of urllib's bounds each read alone, so that a server that sends a byte now and then is waited for forever.
    """

    def __init__(self) -> None:
        self.late = threading.Event()
        self.timer: threading.Timer | None = None
        self.sockets: list[socket.socket] = []

    def __enter__(self) -> _Watch:
        return self

    def __exit__(self, *_: Any) -> None:
        if self.timer is not None:
            self.timer.cancel()
        for each in self.sockets:
            each.close()

    def open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        """The answer, as soon as its headers are there. Raises TimeoutError, or what urllib raises."""
        self.wait()
        handlers = _Plain(self, request.full_url.startswith("https:")), _Encrypted(self)
        try:
            return urllib.request.build_opener(*handlers).open(request, timeout=60)
        except (OSError, http.client.HTTPException) as error:
            self.check(error)
            raise

    def wait(self) -> None:
        """From now on what comes next has its time."""
        if self.timer is not None:
            self.timer.cancel()
        self.timer = threading.Timer(PATIENCE, self._close)
        self.timer.daemon = True
        self.timer.start()

    def check(self, failure: Exception | None = None) -> None:
        """Raise a TimeoutError if that time is over, else ``failure``."""
        if self.late.is_set():
            raise TimeoutError(f"fewer than {BLOCK:,} bytes came in {PATIENCE:g} s") from failure
        if failure is not None:
            raise failure

    def connected(self, connection: http.client.HTTPConnection) -> None:
        self.sockets.append(connection.sock.dup())  # the connection's own changes hands
        if self.late.is_set():
            self._close()

    def _close(self) -> None:
        self.late.set()
        for each in self.sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


class _Connection(http.client.HTTPConnection):
    watch: _Watch

    def connect(self) -> None:
        super().connect()
        self.watch.connected(self)


class _EncryptedConnection(http.client.HTTPSConnection, _Connection):
    """Is watched from before the handshake on: HTTPSConnection.connect calls _Connection.connect first."""


class _Plain(urllib.request.HTTPHandler):
    def __init__(self, watch: _Watch, refused: bool) -> None:
        super().__init__()
        self.watch, self.refused = watch, refused

    def http_open(self, request: urllib.request.Request) -> Any:
        if self.refused:
            raise Fault(f"the address leads to {request.full_url}, which is not encrypted; download the file by hand")
        return self.do_open(_watched(_Connection, self.watch), request)


class _Encrypted(urllib.request.HTTPSHandler):
    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self.watch = watch

    def https_open(self, request: urllib.request.Request) -> Any:
        made = _watched(_EncryptedConnection, self.watch)
        return self.do_open(made, request, context=ssl.create_default_context())


def _watched(kind: Any, watch: _Watch) -> Any:
    def connection(*arguments: Any, **more: Any) -> Any:
        made = kind(*arguments, **more)
        made.watch = watch
        return made

    return connection


def _unpack(source: Source, file: Path, folder: Path) -> None:
    """Unpack an archive into ``folder``; each file gets its name only when it is complete."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = [
                member
                for member in archive.infolist()
                if not member.is_dir()
                and not member.filename.startswith("__MACOSX")
                and (not source.only or member.filename.endswith(source.only))
            ]
            if any(member.flag_bits & 1 for member in members):
                raise Fault(
                    f"{file} is encrypted, which the official archive is not; remove it and run the same command again"
                )
            if sum(member.file_size for member in members) > shutil.disk_usage(file.parent).free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            for member in members:
                path = PurePosixPath(member.filename.replace("\\", "/"))
                if path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
                    raise Fault(
                        f"{file} has a member {member.filename!r} that would be written outside {folder}; "
                        "nothing was unpacked; remove it and get the archive from its official address"
                    )
            for member in tqdm(members, desc=f"unpacking {file.name}", unit="file", disable=None):
                parts = PurePosixPath(member.filename.replace("\\", "/")).parts
                target = folder.joinpath(*parts[-1:] if source.flat else parts)
                target.parent.mkdir(parents=True, exist_ok=True)
                half = target.with_name(target.name + ".part")
                with archive.open(member) as inside, half.open("wb") as sink:
                    shutil.copyfileobj(inside, sink, BLOCK)
                os.replace(half, target)
        os.sync()  # once, not twice for each of 40,000 images; until then the archive is there to unpack again
    except _DAMAGED as error:
        file.unlink(missing_ok=True)
        raise Fault(
            f"{file} is not a complete zip archive ({error}); it was removed, run the same command again"
        ) from error
    except OSError as error:
        if error.errno is None:  # what bz2 raises for damaged data
            file.unlink(missing_ok=True)
            raise Fault(
                f"{file} is not a complete zip archive ({error}); it was removed, run the same command again"
            ) from error
        raise Fault(
            f"{file} cannot be unpacked into {folder} ({error.strerror or error}); make room and run the same "
            "command again"
        ) from error


_DAMAGED = (  # what zipfile and the modules under it raise for archives that are damaged or odd
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, NotImplementedError, RuntimeError,
    ValueError, IndexError, KeyError, OverflowError,
)  # fmt: skip


def _sha256(file: Path) -> str:
    with file.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()
