"""Asks an endpoint for a dispreferred version of every answer, and asks again where a reply cannot be used.

Everything that a run has learned lies in ``OUT.run``: replies.jsonl (append-only, each reply the moment it arrives),
run.json (what the run is), rejects.jsonl and the report. A run that was killed goes on where it was when it is started
again with the same settings; the set it yields depends on the replies alone, not on their order.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from povid.dispreference.gates import Gates, judge
from povid.dispreference.parse import Unusable
from povid.dispreference.prompts import CAPTIONING, REASONING, prompt
from povid.dispreference.rows import Row
from povid.fault import Fault
from povid.preferences.formats import write_atomically
from povid.preferences.triple import Triple
from povid.server.endpoint import Endpoint, NoReply, Request, image_part

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the endpoint is asked.

    ``attempts`` samples per row at most; pictures of at most ``max_side`` pixels; ``send_seed`` sends the sample's
    number as ``seed``, so that servers that honour it give the same set again.
    """

    temperature: float = 1.0
    max_tokens: int = 1024
    attempts: int = 4
    max_side: int = 768
    send_seed: bool = True

    def __post_init__(self) -> None:
        for key, least in (("attempts", 1), ("max_tokens", 1), ("max_side", 16)):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise Fault(f"sampling.{key}: found {value!r}, needed a whole number of at least {least}")
        if isinstance(self.temperature, bool) or not isinstance(self.temperature, int | float) or self.temperature < 0:
            raise Fault(f"sampling.temperature: found {self.temperature!r}, needed a number of at least 0")


@dataclass(slots=True)
class Yield:
    """What became of the rows.

    ``triples`` are in the order of the rows and ``kinds`` beside them; ``rejects`` holds (id, reasons of all tries);
    ``reasons`` counts every reply that could not be used; ``cost`` and ``tokens`` are those of the whole run.
    """

    triples: list[Triple] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    rejects: list[tuple[str, list[str]]] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    replies: int = 0
    cost: float = 0.0
    tokens: int = 0


def folder_of(out: Path) -> Path:
    """Where a run keeps what it needs to go on."""
    return out.with_name(out.name + ".run")


@contextmanager
def claimed(out: Path, identity: dict[str, Any]) -> Iterator[Path]:
    """Hold ``out`` against other processes and against other runs; yields the run's folder.

    Raises:
        Fault: another process writes there, or ``out`` exists and is not this run's own.
    """
    folder = folder_of(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "lock", "w")  # noqa: SIM115
    except OSError as error:
        raise Fault(f"{folder} cannot be written ({error.strerror}); choose another out") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Fault(f"another process is writing {out}; wait for its end or choose another out") from None
        note = folder / "run.json"
        here = json.dumps(identity, sort_keys=True, indent=1)
        if out.exists() and (not note.exists() or note.read_text(encoding="utf-8") != here):
            raise Fault(f"{out} exists and comes from other rows or settings; remove it or choose another out")
        write_atomically(note, here.encode())
        yield folder


def identity(rows: Sequence[Row], **settings: Any) -> dict[str, Any]:
    """What makes two runs the same: the rows, both prompts and all ``settings`` that the result depends on."""
    digest = hashlib.sha256()
    for row in rows:
        image = row.image if isinstance(row.image, bytes) else row.image.name.encode()
        earlier = [turn.text for turn in row.earlier]
        digest.update(json.dumps([row.id, row.question, row.answer, row.kind, earlier]).encode() + image)
    prompts = hashlib.sha256((CAPTIONING + REASONING).encode()).hexdigest()
    return {"rows": digest.hexdigest(), "prompts": prompts, **settings}


def estimate(rows: Sequence[Row], endpoint: Endpoint, sampling: Sampling) -> str:
    """What the run may take at most, in one sentence, before anything is sent."""
    asked = [endpoint.estimate(_request(row, sampling, 0, _NO_PICTURE)) for row in rows]
    tokens, cost = sum(one.tokens for one in asked), sum(one.cost for one in asked)
    money = f" and {cost:,.2f}" if cost else " (give input_price and output_price to see it in money)"
    spent = f"; {endpoint.total.tokens:,} tokens were spent before" if endpoint.total.tokens else ""
    return (
        f"{len(rows):,} rows take at most {tokens:,} tokens{money} for one sample each, and at most "
        f"{sampling.attempts} times that if every sample is refused{spent}"
    )


_NO_PICTURE = {"type": "image_url", "image_url": {"url": ""}}


def generate(
    rows: Sequence[Row],
    endpoint: Endpoint,
    sampling: Sampling,
    gates: Gates,
    *,
    give_up: bool = False,
    quiet: bool = False,
) -> Yield:
    """Ask for every row until a reply passes the gates or ``attempts`` samples were refused.

    A row whose picture cannot be opened is set aside. ``give_up`` also sets aside rows that the server never answered.

    Raises:
        Fault: the budget is reached, or some rows stay without a reply; all replies are kept for the next start.
    """
    result, accepted = Yield(), {}
    refused: dict[int, list[str]] = {}
    silent: dict[int, str] = {}
    waiting = list(range(len(rows)))
    with tqdm(total=len(rows), desc="dispreferences", unit="row", disable=quiet, smoothing=0.05) as bar:
        for attempt in range(sampling.attempts):
            asked: list[int] = []
            for position, reply in endpoint.ask_all(_requests(rows, waiting, sampling, attempt, asked, refused)):
                index = asked[position]
                if isinstance(reply, NoReply):
                    silent[index] = str(reply)
                    continue
                result.replies += 1
                try:
                    accepted[index] = judge(rows[index], reply.text, reply.finish_reason, gates)
                except Unusable as reason:
                    refused.setdefault(index, []).append(str(reason))
                if index in accepted or len(refused.get(index, ())) == sampling.attempts:
                    if reply.cached and not quiet:
                        bar.initial += 1  # replies from disk say nothing about the server's pace
                    bar.update()
                bar.set_postfix_str(
                    f"cost {endpoint.total.cost:.2f}, {endpoint.total.tokens:,} tokens, sample {attempt + 1}",
                    refresh=False,
                )
            waiting = [
                index
                for index in waiting
                if index not in accepted and index not in silent and _BROKEN not in refused.get(index, ())
            ]
    if silent and not give_up:
        raise Fault(
            f"{len(silent)} of {len(rows)} rows got no reply (first: {next(iter(silent.values()))}); all other "
            "replies are kept, so start again to ask only these, or set give_up=true to leave them out"
        )
    for index in sorted(accepted):
        row, found = rows[index], accepted[index]
        result.triples.append(row.triple(found.preferred or row.answer, found.dispreferred))
        result.kinds.append(row.kind)
    result.reasons = Counter(reason for reasons in refused.values() for reason in reasons)
    result.reasons.update("no reply" for _ in silent)
    for index in sorted(set(range(len(rows))) - set(accepted)):
        result.rejects.append((rows[index].id, refused.get(index, []) + ["no reply"] * (index in silent)))
    result.cost, result.tokens = endpoint.total.cost, endpoint.total.tokens
    return result


_BROKEN = "broken picture"


def _requests(
    rows: Sequence[Row],
    waiting: Sequence[int],
    sampling: Sampling,
    attempt: int,
    asked: list[int],
    refused: dict[int, list[str]],
) -> Iterator[Request]:
    """One request per waiting row; ``asked`` is filled with the rows in the order in which they are sent."""
    for index in waiting:
        try:
            part = image_part(rows[index].image, sampling.max_side)
        except Fault as fault:
            log.warning("record %r is set aside: %s", rows[index].id, fault)
            refused[index] = [_BROKEN]
            continue
        asked.append(index)
        yield _request(rows[index], sampling, attempt, part)


def _request(row: Row, sampling: Sampling, attempt: int, part: dict[str, Any]) -> Request:
    content = [part, {"type": "text", "text": prompt(row.kind, row.question, row.answer)}]
    return Request(
        [{"role": "user", "content": content}],
        sampling.temperature,
        sampling.max_tokens,
        attempt,
        f"record {row.id!r}",
        {"seed": attempt} if sampling.send_seed else {},
    )


def settings_of(sampling: Sampling, gates: Gates, model: str) -> dict[str, Any]:
    """The settings that :func:`identity` has to know about."""
    return {"model": model, "sampling": asdict(sampling), "gates": asdict(gates)}
