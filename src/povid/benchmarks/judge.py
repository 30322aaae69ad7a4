"""The judge of benchmarks that a language model scores: asked through a file of replies, so nothing is paid for twice.

Each benchmark's own file holds our wording of the prompt, where the official one is found, the official judge's model
and how a reply is read.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from pydantic import PrivateAttr

from povid.benchmarks.benchmark import Benchmark, Folder
from povid.benchmarks.wording import OFFICIAL, Choice, Wording, choose
from povid.fault import Fault
from povid.server.endpoint import Endpoint, EndpointSettings, NoReply, Reply, Request
from povid.server.replies import Spent
from povid.terminal import counted

log = logging.getLogger(__name__)


class Judge(EndpointSettings):
    """A judging model behind an OpenAI-compatible server.

    Attributes:
        cache: JSON Lines file of replies, shared by all runs.
        model: the judge; None for the official judge of each benchmark.
        wording: "official" asks in the official words and refuses to judge without them, "own" in ours; None in the
            official ones where they were fetched, else in ours. Tables name the wording.

    See ``EndpointSettings`` for the others. Nothing is opened or sent before the first judgement.
    """

    cache: Folder
    wording: Choice = None

    _words: dict[tuple[str, Folder], Wording] = PrivateAttr(default_factory=dict)
    _endpoints: dict[str, Endpoint] = PrivateAttr(default_factory=dict)
    _used: dict[str, Spent] = PrivateAttr(default_factory=lambda: defaultdict(Spent))

    def model_for(self, benchmark: Benchmark) -> str:
        """Name of the model that judges ``benchmark``."""
        return self.model or benchmark.official_judge

    def endpoint(self, benchmark: Benchmark) -> Endpoint:
        """Where ``benchmark`` is judged.

        Raises Fault if no key is set, the model is retired, the wanted wording is missing, or no judge is needed.
        """
        if benchmark.judged == "never":
            raise Fault(f"{benchmark.name} is scored without a judge")
        self.words(benchmark)
        model = self.model_for(benchmark)
        if model not in self._endpoints:
            self._endpoints[model] = Endpoint(self.model_copy(update={"model": model}), self.cache)
        return self._endpoints[model]

    def words(self, benchmark: Benchmark) -> Wording:
        """The prompt's texts for ``benchmark``: the same as long as this judge lives, whatever happens to the file."""
        key = benchmark.name, benchmark.data
        if key not in self._words:
            self._words[key] = found = choose(benchmark, self.wording)
            if self.wording is None and benchmark.prompt_sources and found.name != OFFICIAL:
                log.warning(
                    "%s: the judge is asked in our own wording (%s); `python -m povid.benchmarks fetch %s --data %s` "
                    "gets the official one",
                    benchmark.name,
                    found.name,
                    benchmark.spelling(),
                    benchmark.data,
                )
        return self._words[key]

    def ask(self, benchmark: Benchmark, requests: Sequence[Request]) -> list[Reply]:
        """Replies in the order of the requests. Raises NoReply, once all others are kept, naming the first without."""
        replies: list[Reply | NoReply | None] = [None] * len(requests)
        endpoint = self.endpoint(benchmark)
        title = f"{benchmark.name} judged by {endpoint.model}"
        with counted(log, title, len(requests), unit="replies") as count:
            for position, reply in endpoint.ask_all(requests):
                replies[position] = reply
                if isinstance(reply, Reply):
                    self._used[benchmark.name].add(reply)
                count()
        stale = sum(
            isinstance(reply, Reply) and reply.cached and request.useless(reply)
            for request, reply in zip(requests, replies)
        )
        if stale and not self.ask_again:
            log.warning("%s: judgements on disk that cannot be read: %d; %s", benchmark.name, stale, AGAIN)
        unanswered = [reply for reply in replies if isinstance(reply, NoReply)]
        if unanswered:
            raise NoReply(
                f"{len(unanswered)} of {len(requests)} judgements of {benchmark.name} got no reply, "
                f"the first: {unanswered[0]}"
            ) from unanswered[0]
        return [reply for reply in replies if isinstance(reply, Reply)]

    def describe(self, benchmark: Benchmark) -> dict[str, Any]:
        """What stands beside a score.

        Returns:
            "judge": the model and the prompt, which scores must share to be averaged or compared; "judging": what the
            replies behind the score cost. All replies since the last call count, those from disk at what they cost when
            they were requested.
        """
        words = self.words(benchmark)
        judge = self.identity() | {
            "model": self.model_for(benchmark),
            "official_model": benchmark.official_judge,
            "wording": words.name,
            "prompt": words.digest,
        }
        used = self._used.pop(benchmark.name, Spent())
        return {"judge": judge, "judging": {"replies": used.requests, "tokens": used.tokens, "cost": used.cost}}


AGAIN = "if its server has been mended since, judge.ask_again=true (--judge-ask-again) asks for them once more"


def required(benchmark: Benchmark, judge: Judge | None) -> Judge:
    """The judge of a benchmark that cannot be scored without one. Raises Fault if there is none."""
    if judge is None:
        raise Fault(f"{benchmark.name} needs a judge, and none is configured")
    return judge


def unreadable(benchmark: Benchmark, judge: Judge, count: int, part: str = "") -> Fault:
    """The error for a judge whose replies never had the expected form: there is no score to give."""
    where = f"{benchmark.name} ({part})" if part else benchmark.name
    return Fault(
        f"{where}: none of the {count} replies of the judge {judge.model_for(benchmark)} holds a readable score; "
        f"choose another judge with judge.model=...; {AGAIN}"
    )
