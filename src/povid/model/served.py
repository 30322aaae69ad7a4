"""A model behind an OpenAI-compatible server as an answerer: Qwen-VL-Chat, mPLUG-Owl2, or anything else served."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from povid.fault import Fault
from povid.model.question import Answerer, Decoding, Question
from povid.server.endpoint import Endpoint, NoReply, Request, image_part


def open_answerer(
    model: str, cache: str | Path, *, max_side: int = 1024, system: str | None = None, **settings: Any
) -> Answerer:
    """``answerer`` for a new ``Endpoint(model, cache, **settings)``: what a configuration of a served model calls."""
    return answerer(Endpoint(model, cache, **settings), max_side=max_side, system=system)


@dataclass(frozen=True, slots=True)
class ServedSettings:
    """A model that somebody serves, to be evaluated as it is.

    Args:
        name: its name in results; model: the server's name for it; base_url: the server, up to ``/v1``.
        cache: file in which every reply is kept. max_side: pictures are made no larger than this, in pixels.
        system: a system text, if the model wants one. The others: see ``povid.server.endpoint.Endpoint``.
    """

    name: str
    model: str
    base_url: str
    cache: str
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: int = 8
    timeout: float = 120.0
    retries: int = 6
    max_side: int = 1024
    system: str | None = None

    def answerer(self) -> Answerer:
        endpoint = Endpoint(
            self.model,
            self.cache,
            base_url=self.base_url,
            api_key_env=self.api_key_env,
            concurrency=self.concurrency,
            timeout=self.timeout,
            retries=self.retries,
        )
        return answerer(endpoint, max_side=self.max_side, system=self.system)


def answerer(endpoint: Endpoint, *, max_side: int = 1024, system: str | None = None) -> Answerer:
    """Asks ``endpoint`` every question: the picture first (longest side ``max_side`` pixels), then the text.

    Answers come in the order in which the server gives them. A question that stays without an answer does not stop the
    others; when they are all there, NoReply names it. An absent or broken picture raises Fault naming the question.
    """

    def request(question: Question, decoding: Decoding) -> Request:
        parts = [{"type": "text", "text": question.text}]
        if question.image is not None:
            try:
                parts.insert(0, image_part(question.image, max_side))
            except Fault as fault:
                raise Fault(f"question {question.id}: {fault}") from fault
        first = [{"role": "system", "content": system}] if system else []
        return Request(
            [*first, {"role": "user", "content": parts}],
            temperature=decoding.temperature,
            max_tokens=decoding.max_new_tokens,
            name=f"question {question.id}",
        )

    def answer(questions: Sequence[Question], decoding: Decoding) -> Iterator[tuple[int, str]]:
        unanswered: list[NoReply] = []
        for index, reply in endpoint.ask_all(request(question, decoding) for question in questions):
            if isinstance(reply, NoReply):
                unanswered.append(reply)
            else:
                yield index, reply.text.strip()
        if unanswered:
            raise NoReply(
                f"{len(unanswered)} of {len(questions)} questions got no answer, the first: {unanswered[0]}"
            ) from unanswered[0]

    return answer
