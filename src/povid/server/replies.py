"""A server's replies on disk: written the moment they arrive, shared by processes, counted against a budget."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from math import inf
from pathlib import Path
from typing import Any

from povid.fault import Fault

log = logging.getLogger(__name__)


class BudgetReached(Fault):
    """The next request could exceed the budget; nothing was sent."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply; ``cost`` in the currency of the prices (0 without prices), ``cached`` if it was already on disk."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    cost: float
    finish_reason: str
    cached: bool = False

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(slots=True)
class Spent:
    """The number of requests, and the tokens and money that they took."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0

    def add(self, reply: Reply) -> None:
        self.requests += 1
        self.prompt_tokens += reply.prompt_tokens
        self.completion_tokens += reply.completion_tokens
        self.cost += reply.cost

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


class ReplyFile:
    """An append-only JSON Lines file of replies by key, and a folder of claims beside it for requests in flight.

    Each line carries a checksum: a reply that was edited or damaged afterwards is not used and is asked for again (what
    it cost still counts). Lines of earlier versions have none and are used as they are.

    Every process appends under a file lock. A claim is a locked file named by its key: its holder sends the request,
    the others wait and then find the reply. A lock ends with its process, so a kill blocks nobody.

    ``total`` is what all processes that wrote to the file have spent, ``models`` are those that replied. ``budget``
    (currency) and ``token_budget`` bound the total, including what requests in flight may still cost.
    """

    def __init__(self, file: Path, budget: float | None = None, token_budget: int | None = None) -> None:
        self.file, self.budget, self.token_budget = file, budget, token_budget
        self.total = Spent()
        self.models: set[str] = set()
        self._claims = file.with_name(file.name + ".claims")
        self._replies: dict[str, Reply] = {}
        self._read_to = 0
        self._lock = threading.RLock()
        try:
            self._claims.mkdir(parents=True, exist_ok=True)
            file.touch()
        except OSError as error:
            raise Fault(
                f"{file}: replies cannot be kept there ({error.strerror}); "
                "choose a file in a folder that can be written"
            ) from error
        self.read_new()

    def get(self, key: str) -> Reply | None:
        """The reply, if it has been read."""
        with self._lock:
            return self._replies.get(key)

    def read_new(self) -> None:
        """Read the lines that this or another process has appended; an incomplete last line is left for later."""
        with self._lock:
            with self.file.open("rb") as file:
                file.seek(self._read_to)
                block = file.read()
            block = block[: block.rfind(b"\n") + 1]
            self._read_to += len(block)
            for line in block.splitlines():
                self._take(line)

    def keep(self, key: str, name: str, reply: Reply, about: dict[str, Any]) -> None:
        """Append a reply; ``about`` says what was asked. Raises Fault on a full disk."""
        record = {
            "key": key,
            "name": name,
            **about,
            "text": reply.text,
            "prompt_tokens": reply.prompt_tokens,
            "completion_tokens": reply.completion_tokens,
            "cost": reply.cost,
            "finish_reason": reply.finish_reason,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        line = json.dumps(record | {"check": _check(record)}).encode() + b"\n"
        with self._locked() as file:
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(end - 1)
                if file.read(1) != b"\n":
                    line = b"\n" + line  # ends a line that a killed process left incomplete
            try:
                while line:
                    line = line[file.write(line) :]
            except OSError as error:
                raise Fault(
                    f"{self.file}: the reply to {name} could not be written ({error.strerror}); make room and run again"
                ) from error
        self.read_new()

    @contextmanager
    def claim(self, key: str) -> Iterator[int]:
        """Wait until no other process is sending this request, and hold it until the reply is kept."""
        path = self._claims / key
        while True:
            claim = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            fcntl.flock(claim, fcntl.LOCK_EX)
            try:
                if os.stat(path).st_ino == os.fstat(claim).st_ino:
                    break
            except FileNotFoundError:
                pass
            os.close(claim)  # its last owner removed it while this process waited
        try:
            yield claim
        finally:
            path.unlink(missing_ok=True)
            os.close(claim)

    def reserve(self, claim: int, name: str, need: Reply, stop: threading.Event) -> None:
        """Reserve what a request may cost; waits while reservations of others may still turn out smaller.

        Raises BudgetReached if it would not fit even without the others.
        """
        if self.budget is None and self.token_budget is None:
            return
        while True:
            with self._locked():
                self.read_new()
                money, tokens = self._reserved()
                if self._fits(need.cost + money, need.tokens + tokens):
                    os.pwrite(claim, json.dumps([need.cost, need.tokens]).encode(), 0)
                    return
                if not self._fits(need.cost, need.tokens) or stop.is_set():
                    limit = f"{self.budget:g}" if self.budget is not None else f"{self.token_budget} tokens"
                    raise BudgetReached(
                        f"{name}: stopped before the budget of {limit} would be exceeded ({self.total.cost:.4f} and "
                        f"{self.total.tokens} tokens spent so far in {self.file}, up to {need.cost:.4f} and "
                        f"{need.tokens} tokens needed next); raise the budget to continue"
                    )
            stop.wait(0.05)

    def _fits(self, cost: float, tokens: int) -> bool:
        return (self.budget is None or self.total.cost + cost <= self.budget) and (
            self.token_budget is None or self.total.tokens + tokens <= self.token_budget
        )

    def _reserved(self) -> tuple[float, int]:
        """What requests in flight have reserved in all processes; claims of killed processes are removed."""
        money, tokens = 0.0, 0
        for path in self._claims.iterdir():
            try:
                claim = os.open(path, os.O_RDWR)
            except FileNotFoundError:
                continue
            try:
                fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)
            except BlockingIOError:
                if amount := os.pread(claim, 200, 0):
                    money, tokens = money + json.loads(amount)[0], tokens + json.loads(amount)[1]
            finally:
                os.close(claim)
        return money, tokens

    def _take(self, line: bytes) -> None:
        if not line.strip():
            return
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # a process was killed while writing; its request will be asked again
            log.warning("%s: an incomplete line is skipped: %s", self.file, line[:60])
            return
        try:
            reply = Reply(
                record["text"],
                record["prompt_tokens"],
                record["completion_tokens"],
                record["cost"],
                record["finish_reason"],
                cached=True,
            )
            sound = isinstance(reply.text, str) and isinstance(reply.finish_reason, str)
            if not (sound and min(reply.prompt_tokens, reply.completion_tokens, reply.cost) >= 0 and reply.cost < inf):
                raise TypeError("a value of another kind")
            if record.get("check") in (None, _check(record)):
                self._replies[record["key"]] = reply
            else:
                log.warning(
                    "%s: the reply to %s was changed after it was written; it is not used and is asked for again",
                    self.file,
                    record.get("name"),
                )
        except (KeyError, TypeError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise Fault(
                f"{self.file}: a line is not a reply ({what}); name another file, this one belongs to something else"
            ) from error
        self.total.add(reply)
        self.models.add(str(record.get("model")))

    @contextmanager
    def _locked(self) -> Iterator[Any]:
        with self.file.open("r+b", buffering=0) as file:  # no buffer that a full disk would fail a second time
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file


def _check(record: dict[str, Any]) -> str:
    """Sixteen hexadecimal digits that change with anything in a line."""
    content = {key: value for key, value in record.items() if key != "check"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
