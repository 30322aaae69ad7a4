"""Asks an endpoint for a dispreferred version of every answer, and asks again when a reply cannot be used.

The folder ``OUT.run`` keeps all that a run needs to resume: replies.jsonl (each reply appended the moment it arrives),
run.json (what identifies the run), rejects.jsonl and the report. A killed run resumes when it is started again with the
same settings; its result depends on the replies alone, not on their order.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from tqdm import tqdm

from povid.dispreference.gates import Gates, judge
from povid.dispreference.parse import Parsed, Unusable
from povid.dispreference.prompts import CAPTIONING, REASONING, prompt
from povid.dispreference.rows import Made, Row
from povid.fault import Fault
from povid.files import write_text
from povid.preferences.stored import picture_bytes
from povid.server.endpoint import Endpoint, EndpointSettings, NoReply, Request, image_part
from povid.server.replies import Reply

log = logging.getLogger(__name__)


class Sampling(BaseModel):
    """How the endpoint is asked.

    Attributes:
        temperature: at least 0.
        max_tokens: longest reply, in tokens.
        attempts: samples per row before it is set aside.
        max_side: pixels of the longer side of the picture that is sent.
        send_seed: send the number of the sample as ``seed``; servers that honour it then give the same replies again.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    temperature: float = Field(1.0, ge=0)
    max_tokens: int = Field(1024, ge=1)
    attempts: int = Field(4, ge=1)
    max_side: int = Field(768, ge=16)
    send_seed: bool = True


class VisionModel(BaseModel):
    """Dispreferred answers from a vision model behind an OpenAI-compatible server, by Table 6's prompts.

    Attributes:
        give_up: leave out rows that the server never answered, instead of stopping.
        estimate_only: print what the run would cost at most, and stop.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str = "endpoint"
    endpoint: EndpointSettings = EndpointSettings()
    sampling: Sampling = Sampling()
    gates: Gates = Gates()
    give_up: bool = False
    estimate_only: bool = False

    def identity(self, rows: Sequence[Row], seed: int) -> dict[str, Any]:
        """What the result depends on besides the rows."""
        asked = {"sampling": self.sampling.model_dump(), "gates": self.gates.model_dump()}
        return self.endpoint.identity() | asked

    def generate(self, rows: Sequence[Row], folder: Path, seed: int) -> Made | None:
        """Ask for every row, keeping each reply in ``folder``; None if only an estimate was wanted."""
        endpoint = Endpoint(self.endpoint, folder / "replies.jsonl")
        print(estimate(rows, endpoint, self.sampling), file=sys.stderr, flush=True)
        if self.estimate_only:
            return None
        made = generate(rows, endpoint, self.sampling, self.gates, give_up=self.give_up)
        made.figures["model"] = self.endpoint.model
        return made


def folder_of(out: Path) -> Path:
    """The folder in which a run keeps what it needs to resume."""
    return out.with_name(out.name + ".run")


@contextmanager
def claimed(out: Path, identity: dict[str, Any]) -> Iterator[Path]:
    """Lock ``out`` against other processes and other runs; yields the run's folder.

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
            raise Fault(f"another process is writing {out}; wait until it ends or choose another out") from None
        note = folder / "run.json"
        here = json.dumps(identity, sort_keys=True, indent=1)
        if out.exists() and (not note.exists() or note.read_text(encoding="utf-8") != here):
            raise Fault(f"{out} exists and comes from other rows or settings; remove it or choose another out")
        write_text(note, here)
        yield folder


def identity(rows: Sequence[Row], **settings: Any) -> dict[str, Any]:
    """What makes two runs the same: the rows, both prompts and the ``settings`` that the result depends on."""
    digest = hashlib.sha256()
    for row in rows:
        image = row.image.name.encode() if isinstance(row.image, Path) else picture_bytes(row.image)
        earlier = [turn.text for turn in row.earlier]
        digest.update(json.dumps([row.id, row.question, row.answer, row.kind, earlier]).encode() + image)
    prompts = hashlib.sha256((CAPTIONING + REASONING).encode()).hexdigest()
    return {"rows": digest.hexdigest(), "prompts": prompts, **settings}


def estimate(rows: Sequence[Row], endpoint: Endpoint, sampling: Sampling) -> str:
    """One sentence about what the run can cost at most; nothing is sent."""
    asked = [endpoint.estimate(_request(row, sampling, 0, _NO_PICTURE)) for row in rows]
    tokens, cost = sum(one.tokens for one in asked), sum(one.cost for one in asked)
    money = f" and {cost:,.2f}" if cost else " (give input_price and output_price to see it in money)"
    spent = f"; {endpoint.total.tokens:,} tokens have been spent before" if endpoint.total.tokens else ""
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
) -> Made:
    """Ask for every row until a reply passes the gates or ``attempts`` samples have been refused.

    A row whose picture cannot be opened is set aside. ``give_up`` also sets aside rows that the server never answered.

    Raises:
        Fault: the budget is reached, or some rows got no reply; all replies are kept for the next start.
    """
    result, accepted = Made(), {}
    refused: dict[int, list[str]] = {}
    silent: dict[int, str] = {}
    waiting = list(range(len(rows)))
    replies = stale = 0
    with tqdm(total=len(rows), desc="dispreferences", unit="row", disable=quiet, smoothing=0.05) as bar:
        for attempt in range(sampling.attempts):
            asked: list[int] = []
            for position, reply in endpoint.ask_all(_requests(rows, waiting, sampling, gates, attempt, asked, refused)):
                index = asked[position]
                if isinstance(reply, NoReply):
                    silent[index] = str(reply)
                    continue
                replies += 1
                try:
                    accepted[index] = judge(rows[index], reply.text, reply.finish_reason, gates)
                except Unusable as reason:
                    refused.setdefault(index, []).append(str(reason))
                    stale += reply.cached
                if index in accepted or len(refused.get(index, ())) == sampling.attempts:
                    if reply.cached and not quiet:
                        bar.initial += 1  # replies from disk do not show the server's speed
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
    if stale and not endpoint.settings.ask_again:
        log.warning(
            "refused replies that were on disk: %d; if the server has been mended since, endpoint.ask_again=true asks "
            "for them once more",
            stale,
        )
    if silent and not give_up:
        raise Fault(
            f"{len(silent)} of {len(rows)} rows got no reply (first: {next(iter(silent.values()))}); all other "
            "replies are kept: start again to ask only for these, or set give_up=true to leave them out"
        )
    for index in sorted(accepted):
        row, found = rows[index], accepted[index]
        result.triples.append(row.triple(found.preferred or row.answer, found.dispreferred))
        result.kinds.append(row.kind)
    result.reasons = Counter(reason for reasons in refused.values() for reason in reasons)
    result.reasons.update("no reply" for _ in silent)
    for index in sorted(set(range(len(rows))) - set(accepted)):
        result.rejects.append((rows[index].id, refused.get(index, []) + ["no reply"] * (index in silent)))
    result.figures = {"replies": replies, "tokens": endpoint.total.tokens, "cost": endpoint.total.cost}
    return result


_BROKEN = "broken picture"


def _requests(
    rows: Sequence[Row],
    waiting: Sequence[int],
    sampling: Sampling,
    gates: Gates,
    attempt: int,
    asked: list[int],
    refused: dict[int, list[str]],
) -> Iterator[Request]:
    """One request per waiting row; ``asked`` collects the rows in the order in which they are sent."""
    for index in waiting:
        try:
            part = image_part(rows[index].image, sampling.max_side)
        except Fault as fault:
            log.warning("record %r is set aside: %s", rows[index].id, fault)
            refused[index] = [_BROKEN]
            continue
        asked.append(index)
        yield _request(rows[index], sampling, attempt, part, functools.partial(_read, rows[index], gates))


def _read(row: Row, gates: Gates, reply: Reply) -> Parsed | None:
    """What passes the gates, if the reply does."""
    try:
        return judge(row, reply.text, reply.finish_reason, gates)
    except Unusable:
        return None


def _request(
    row: Row, sampling: Sampling, attempt: int, part: dict[str, Any], reads: Callable[[Reply], Any] | None = None
) -> Request:
    content = [part, {"type": "text", "text": prompt(row.kind, row.question, row.answer)}]
    return Request(
        [{"role": "user", "content": content}],
        sampling.temperature,
        sampling.max_tokens,
        attempt,
        f"record {row.id!r}",
        {"seed": attempt} if sampling.send_seed else {},
        reads,
    )
