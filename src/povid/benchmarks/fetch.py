"""Download the official files of a benchmark, or say what must be done by hand."""

from __future__ import annotations

import contextlib
import errno
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
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from povid.benchmarks import wording
from povid.benchmarks.benchmark import Benchmark, Source
from povid.fault import Fault
from povid.files import sync, write_json

BLOCK = 1 << 20  # bytes
PATIENCE = 300.0  # seconds in which a block must come, and before the first all headers, redirections included
RECORD = "fetched.json"  # in the data folder: address, size and sha256 of what came


def main(benchmark: type[Benchmark], data: Path) -> int:
    """Download what can be, report it, and say what is left to do by hand; returns the exit status 0.

    The judge's official prompt is read in the official script as soon as that is there. The official gradings, which
    only ``calibrate`` needs, come last.
    """
    if not benchmark.sources:
        print(f"{benchmark.name} names no files to download; put its files into {data}")
    for file in fetch((*benchmark.sources, *benchmark.prompt_sources), data):
        print(f"{file} is complete")
    if (prompt := wording.store(benchmark, data)) is not None:
        print(f"{prompt} has the judge's official prompt, word for word")
    for file in fetch(getattr(benchmark, "graded", ()), data):
        print(f"{file} is complete")
    if benchmark.notice:
        print(benchmark.notice.format(data=data))
    return 0


def fetch(sources: Sequence[Source], data: Path, *, tries: int = 5, pause: float = 1.0) -> list[Path]:
    """Download files into ``data``; those that are there and recorded are left alone.

    A download that breaks off is kept as FILE.part and resumed; a file gets its name only when it is complete and
    checked. Its address, size and sha256 are recorded in ``data/fetched.json``.

    Raises:
        Fault: no connection after ``tries`` attempts, an address that answers with an error or too slowly, a wrong size
            or hash, a length that is nowhere stated, a full disk, an archive that is damaged, encrypted or would write
            outside ``data``.
    """
    data = Path(data)
    try:
        data.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Fault(f"{data} cannot be created ({error.strerror}); choose another folder") from error
    record = data / RECORD
    try:
        known = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
        known = {str(name): dict(entry) for name, entry in known.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise Fault(f"{record} is not a record of downloads ({error}); remove it and run again") from error
    files = []
    for source in sources:
        file = data / source.file
        if known.get(source.file, {}).get("url") != source.url or not (file.is_file() or source.unpack):
            size, digest = _download(source, file, tries, pause)
            if source.unpack:
                _unpack(source, file, data / source.unpack)
                file.unlink()
            known[source.file] = {"url": source.url, "size": size, "sha256": digest}
            write_json(record, known)
        files.append(file if not source.unpack else data / source.unpack)
    return list(dict.fromkeys(files))


def _download(source: Source, file: Path, tries: int, pause: float) -> tuple[int, str]:
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    for attempt in range(tries):
        try:
            _transfer(source, part)
            break
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code != 429:
                raise Fault(
                    f"{source.url} answers {error.code} {error.reason}; open it in a browser, download "
                    f"{file.name} by hand and put it into {file.parent}"
                ) from error
            reason = f"{error.code} {error.reason}"
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
                f"{source.url} could not be downloaded in {tries} attempts ({reason}); check the network and run "
                "the same command again to resume"
            )
        time.sleep(pause * 2**attempt)
    size, digest = part.stat().st_size, _sha256(part)
    if source.size not in (None, size) or source.sha256 not in (None, digest):
        part.unlink()
        raise Fault(
            f"{source.url} gave {size:,} bytes with sha256 {digest}, expected were "
            f"{source.size or size:,} bytes with {source.sha256 or 'any'}; it was removed. Run the same command again; "
            "if this repeats, the official file has changed"
        )
    os.replace(part, file)  # _transfer has forced its content to disk
    sync(file.parent)
    return size, digest


def _transfer(source: Source, part: Path) -> None:
    """Append what is missing to ``part``; EOFError when the connection ends before the announced length."""
    have = part.stat().st_size if part.exists() else 0
    tag = part.with_name(part.name + ".tag")  # which version of the file the part belongs to
    request = urllib.request.Request(source.url, headers={"User-Agent": "povid"})
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
            f"{source.url} does not say how long the file is, so that nobody could tell whether it is whole; open "
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
                        "nothing was unpacked; get the archive from its official address"
                    )
            for member in tqdm(members, desc=f"unpacking {file.name}", unit="file", disable=None):
                target = folder.joinpath(*PurePosixPath(member.filename.replace("\\", "/")).parts)
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
