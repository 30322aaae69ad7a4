"""Download many small files over several connections side by side; those that are there and whole are left alone."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
from tqdm import tqdm

from povid.fault import Fault
from povid.fetching.download import retry_after

CONNECTIONS = 8
TRIES = 4  # for each file
PAUSE = 1.0  # seconds before the second attempt
PATIENCE = 60.0  # seconds for one file
LARGEST = 64 << 20  # bytes; what is larger is no single picture
FAILURES_IN_A_ROW = 50  # with no file in between: the server has none of them, or is not to be reached


@dataclass
class Outcome:
    """How many files were there and came, and why the others did not: file → reason."""

    there: int = 0
    came: int = 0
    missing: dict[Path, str] = field(default_factory=dict)


class _Again(Exception):
    """An attempt that may succeed later; ``wait``: seconds before the server wants to be asked again."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


def fetch_many(
    wanted: Mapping[str, Path],
    damage: Callable[[Path], str | None],
    *,
    title: str,
) -> Outcome:
    """Download files, each to its own place.

    A file gets its name only when it is complete, so that a download that is broken off loses the files in flight alone
    and continues with the others. A file that is there and damaged is replaced once a whole one has come.

    Args:
        wanted: address → file.
        damage: why a file on the disk is not whole; None if it is.
        title: of the progress bar, and what sentences call the files.

    Raises:
        Fault: a full disk, or :data:`FAILURES_IN_A_ROW` files in a row that could not be downloaded.
    """
    outcome, lacking = Outcome(), {}
    for address, file in wanted.items():
        if file.is_file() and damage(file) is None:
            outcome.there += 1
        else:
            lacking[address] = file
            file.parent.mkdir(parents=True, exist_ok=True)
    if not lacking:
        return outcome
    stop, in_a_row = threading.Event(), 0
    pool = ThreadPoolExecutor(CONNECTIONS)
    limits = httpx2.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS)
    headers = {"User-Agent": "povid", "Accept-Encoding": "identity"}
    with (
        httpx2.Client(timeout=30, limits=limits, headers=headers) as client,
        tqdm(total=len(wanted), initial=outcome.there, desc=title, unit="file", disable=None) as bar,
    ):
        try:
            tasks = {pool.submit(_one, client, address, file, damage, stop): file for address, file in lacking.items()}
            for task in as_completed(tasks):
                reason = task.result()
                bar.update()
                if reason is None:
                    outcome.came, in_a_row = outcome.came + 1, 0
                    continue
                outcome.missing[tasks[task]] = reason
                in_a_row += 1
                if in_a_row >= FAILURES_IN_A_ROW:
                    raise Fault(
                        f"{title}: the last {in_a_row} files could not be downloaded ({reason}), and "
                        f"{outcome.there + outcome.came:,} of {len(wanted):,} are there; check the network and the "
                        "address, and run the same command again to resume"
                    )
        except OSError as error:
            folder = next(iter(lacking.values())).parent
            raise Fault(
                f"{title}: {folder} cannot be written ({error.strerror or error}) after "
                f"{outcome.there + outcome.came:,} of {len(wanted):,} files, {shutil.disk_usage(folder).free:,} bytes "
                "are free; make room and run the same command again to resume"
            ) from error
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
            if outcome.came:
                os.sync()  # once, not for each of thousands of files; what a power cut damages is downloaded again
    return outcome


def _one(
    client: httpx2.Client,
    address: str,
    file: Path,
    damage: Callable[[Path], str | None],
    stop: threading.Event,
) -> str | None:
    """Download one file. Returns why it could not be had; None if it could. Raises OSError if it cannot be written."""
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    reason = "not asked for"
    try:
        for attempt in range(TRIES):
            if stop.is_set():
                break
            wait = PAUSE * 2**attempt
            try:
                if refused := _receive(client, address, part):
                    return refused
                if (damaged := damage(part)) is None:
                    os.replace(part, file)
                    return None
                reason = f"what came is no whole picture ({damaged.replace(str(part), 'it')})"
            except _Again as again:
                reason, wait = str(again), max(wait, again.wait)
            except httpx2.HTTPError as error:
                reason = str(error) or type(error).__name__
            if attempt + 1 < TRIES:
                stop.wait(wait)
        return reason
    finally:
        part.unlink(missing_ok=True)


def _receive(client: httpx2.Client, address: str, part: Path) -> str | None:
    """Write what an address holds to ``part``. Returns how the server refused; raises _Again and httpx2.HTTPError."""
    end = time.monotonic() + PATIENCE
    with client.stream("GET", address) as answer:
        said = f"the server answers {answer.status_code} {answer.reason_phrase}"
        if answer.status_code in (408, 429) or answer.status_code >= 500:
            raise _Again(said, retry_after(answer.headers.get("Retry-After")))
        if answer.status_code != 200:
            return said
        with part.open("wb") as sink:
            for block in answer.iter_raw():
                sink.write(block)
                if time.monotonic() > end:
                    raise _Again(f"it did not come within {PATIENCE:g} s")
                if sink.tell() > LARGEST:
                    return f"it has more than {LARGEST:,} bytes"
    return None
