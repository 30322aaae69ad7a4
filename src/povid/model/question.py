"""What every benchmark consists of: questions, how answers are decoded, who answers, and the score."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from povid.preferences.stored import Picture


@dataclass(frozen=True, slots=True)
class Question:
    """One thing to ask about one image.

    ``id`` is unique within the benchmark. ``image`` is a file, its encoded bytes, or None for a question without an
    image; equal values mean the same image, so its features and prefix may be shared. ``text`` is what the model
    is asked, suffix included, without an image marker. ``meta`` holds what scoring and the official answer format need.
    ``sample`` numbers the samples where the same thing is asked several times, which a server must tell apart.
    """

    id: str | int
    image: Picture | None
    text: str
    meta: Mapping[str, Any] = field(default_factory=dict)
    sample: int | None = None


@dataclass(frozen=True, slots=True)
class Decoding:
    """How answers are generated: at most ``max_new_tokens`` of them; ``temperature`` 0 is greedy, without beams.

    ``stop``: generation may end once the answer contains this text; nothing after it is ever read.
    """

    max_new_tokens: int
    temperature: float = 0.0
    stop: str | None = None


Answerer = Callable[[Sequence[Question], Decoding], Iterator[tuple[int, str]]]
"""Takes the unanswered questions and yields (index, answer text) for each once, in any order, as answers arrive."""


@dataclass(slots=True)
class Score:
    """``scores``: the figures, nested, named as in results.json. ``records``: what was decided for each answer."""

    scores: dict[str, Any]
    records: list[dict[str, Any]]
