"""The judge of benchmarks that a language model scores: asked through a file of replies, so nothing is paid for twice.

Each benchmark's own file holds the prompt, the official judge's model and how a reply is read.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from pydantic import PrivateAttr

from povid.benchmarks.benchmark import Benchmark, Folder
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

    See ``EndpointSettings`` for the others. Nothing is opened or sent before the first judgement.
    """

    cache: Folder

    _endpoints: dict[str, Endpoint] = PrivateAttr(default_factory=dict)
    _used: dict[str, Spent] = PrivateAttr(default_factory=lambda: defaultdict(Spent))

    def model_for(self, benchmark: Benchmark) -> str:
        """Name of the model that judges ``benchmark``."""
        return self.model or benchmark.official_judge

    def endpoint(self, benchmark: Benchmark) -> Endpoint:
        """Where ``benchmark`` is judged. Raises Fault if no key is set, or if the benchmark needs no judge."""
        if benchmark.judged == "never":
            raise Fault(f"{benchmark.name} is scored without a judge")
        model = self.model_for(benchmark)
        if model not in self._endpoints:
            self._endpoints[model] = Endpoint(self.model_copy(update={"model": model}), self.cache)
        return self._endpoints[model]

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
        unanswered = [reply for reply in replies if isinstance(reply, NoReply)]
        if unanswered:
            raise NoReply(
                f"{len(unanswered)} of {len(requests)} judgements of {benchmark.name} got no reply, "
                f"the first: {unanswered[0]}"
            ) from unanswered[0]
        return [reply for reply in replies if isinstance(reply, Reply)]

    def describe(self, benchmark: Benchmark) -> dict[str, Any]:
        """What stands beside a score: the judge's model, the prompt's wording, and what the replies behind it cost.

        All replies since the last call count, those from disk at what they cost when they were requested.
        """
        used = self._used.pop(benchmark.name, Spent())
        return {
            "model": self.model_for(benchmark),
            "official_model": benchmark.official_judge,
            "wording": benchmark.wording,
            "replies": used.requests,
            "tokens": used.tokens,
            "cost": used.cost,
        }


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
        "choose another judge with judge.model=..."
    )
