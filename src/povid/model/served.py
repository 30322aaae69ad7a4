"""A model behind an OpenAI-compatible server, evaluated as it is: Qwen-VL-Chat, mPLUG-Owl2, or anything else served."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field, Strict

from povid.fault import Fault
from povid.model.question import Answerer, Decoding, Question
from povid.preferences.triple import pictures_of
from povid.server.endpoint import Endpoint, EndpointSettings, NoReply, Request, image_part


class ServedModel(EndpointSettings):
    """A served model: the settings of its server, and how questions are put to it.

    Attributes:
        name: its name in results and tables.
        model: its name on the server; base_url: the server, up to ``/v1``. See ``EndpointSettings`` for the others.
        cache: JSON Lines file in which every reply is kept.
        max_side: images are resized so that no side exceeds this, in pixels.
        system: a system prompt, if the model wants one.
    """

    trainable: ClassVar[bool] = False
    answers_depend_on_batch: ClassVar[bool] = False  # each question is a request of its own
    max_length: ClassVar[int | None] = None  # the server knows its own limit

    name: str = Field(min_length=1)
    model: str = Field(min_length=1)
    base_url: str = Field(min_length=1)
    cache: Annotated[Path, Strict(False)]
    max_side: int = Field(1024, ge=16)
    system: str | None = None

    def answerer(
        self, adapters: Sequence[Path] = (), *, batch_size: int = 1, seed: int = 0, device: Any = None
    ) -> Answerer:
        """An answerer that asks the server, which knows nothing of ``batch_size`` and ``device``.

        ``seed`` is that of questions that are numbered samples (``Question.sample``); no other request has one.

        Raises:
            Fault: adapters are given, which a server cannot load from here, or the key of the server is missing.
        """
        if adapters:
            raise Fault(
                f"model {self.name!r} is served and cannot load the adapter {adapters[0]}; merge the adapter into the "
                "weights, serve the result, and set model.model to its name"
            )
        return ServedAnswers(Endpoint(self, self.cache), max_side=self.max_side, system=self.system, seed=seed)


class ServedAnswers:
    """Answers questions through ``endpoint``: the image first (longest side ``max_side`` pixels), then the text."""

    def __init__(self, endpoint: Endpoint, *, max_side: int = 1024, system: str | None = None, seed: int = 0) -> None:
        self.endpoint, self.max_side, self.system, self.seed = endpoint, max_side, system, seed

    def __call__(self, questions: Sequence[Question], decoding: Decoding) -> Iterator[tuple[int, str]]:
        """Yield (index, answer) in the order in which the server replies.

        Raises:
            NoReply: after all other answers, if some question got none; it names the first.
            Fault: an image is missing or broken; it names the question.
        """
        unanswered: list[NoReply] = []
        for index, reply in self.endpoint.ask_all(self._request(question, decoding) for question in questions):
            if isinstance(reply, NoReply):
                unanswered.append(reply)
            else:
                yield index, reply.text.strip()
        if unanswered:
            raise NoReply(
                f"{len(unanswered)} of {len(questions)} questions got no answer, the first: {unanswered[0]}"
            ) from unanswered[0]

    def _request(self, question: Question, decoding: Decoding) -> Request:
        parts = [{"type": "text", "text": question.text}]
        try:
            parts = [*(image_part(picture, self.max_side) for picture in pictures_of(question.image)), *parts]
        except Fault as fault:
            raise Fault(f"question {question.id}: {fault}") from fault
        first = [{"role": "system", "content": self.system}] if self.system else []
        numbered = question.sample is not None
        return Request(
            [*first, {"role": "user", "content": parts}],
            temperature=decoding.temperature,
            max_tokens=decoding.max_new_tokens,
            sample=question.sample or 0,
            name=f"question {question.id}",
            extra={"seed": self._seed(question)} if numbered else {},
        )

    def _seed(self, question: Question) -> int:
        """31 bits from seed, id, text and number of the sample."""
        drawn = f"{self.seed} {question.id!r} {question.text} {question.sample}"
        return int.from_bytes(hashlib.sha256(drawn.encode()).digest()[:4], "big") >> 1
