"""What a benchmark is: its settings, questions, score, columns in tables, official files and where they come from.

A new benchmark is one file with a subclass of :class:`Benchmark` and one YAML that names it as ``_target_``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, Strict

from povid.fault import Fault
from povid.fetching.source import Source
from povid.model.question import Decoding, Question, Score

if TYPE_CHECKING:
    from povid.benchmarks.judge import Judge

Folder = Annotated[Path, Strict(False)]
"""A path, which configuration files write as text."""


@dataclass(frozen=True)
class Column:
    """``key`` is ``benchmark.score`` in results.json; ``better`` the direction, None for what is not a contest."""

    key: str
    title: str
    better: Literal["low", "high"] | None
    decimals: int
    subscript: str = ""

    @property
    def name(self) -> str:
        return self.title + (f"_{self.subscript}" if self.subscript else "")

    @property
    def heading(self) -> str:
        return self.name + self.arrow

    @property
    def arrow(self) -> str:
        return {"low": " ↓", "high": " ↑", None: ""}[self.better]


def paired(
    picture: str | int, sums: Mapping[str, Sequence[int]], group: str | None = None, mentions: str | None = None
) -> dict[str, Any]:
    """What a record holds under "paired" so that ``povid report compare`` can compare the answers of two runs.

    Args:
        picture: what the question is about; questions about one picture are resampled together.
        sums: figure → (numerator, denominator) that this answer adds; the figure is 100 x sum / sum.
        group: figures are computed within each group and averaged, such as POPE's splits; None for a single one.
        mentions: one letter for each object that a caption mentions, in order: n (true, named for the first time), r
            (true, repeated), h (hallucinated). "coverage" must be among the sums.
    """
    found: dict[str, Any] = {"picture": picture, "sums": {key: list(terms) for key, terms in sums.items()}}
    return found | {key: value for key, value in (("group", group), ("mentions", mentions)) if value is not None}


class Benchmark(BaseModel, ABC):
    """A benchmark and its settings. Subclasses add settings of their own as fields with types and bounds.

    Class attributes:
        name: what errors, official files and the keys of ``columns`` call it.
        official: the official script whose figures ``score`` reproduces.
        columns: what tables show of its scores.
        sources: official files that can be downloaded; notice: what to do by hand, with ``{data}`` for the folder.
        judged: whether a judge scores it ("always"), helps where it can ("optional") or has no part in it ("never").
        official_judge: the official judge's model.
        wording: the version of the judge's prompt in our own words. prompt_sources: the official scripts that have it.
        decimals: digits after the point when its scores are printed. stop: see ``Decoding``.
        again: the benchmark whose answers it scores again: where a selection holds both and they are decoded alike, a
            question of both (with the same id, text and picture) is asked once.

    Attributes:
        data: folder of its official files.
        images: folder of its images; None for their usual place in ``data``.
        max_new_tokens, temperature: how answers are generated; temperature 0 is greedy.
        limit: ask only about the first so many pictures (see ``first``), for a quick look; None for all of them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: ClassVar[str]
    official: ClassVar[str]
    columns: ClassVar[tuple[Column, ...]] = ()
    sources: ClassVar[tuple[Source, ...]] = ()
    notice: ClassVar[str] = ""
    judged: ClassVar[Literal["never", "optional", "always"]] = "never"
    official_judge: ClassVar[str] = ""
    wording: ClassVar[str] = ""
    prompt_sources: ClassVar[tuple[Source, ...]] = ()
    decimals: ClassVar[int] = 1
    stop: ClassVar[str | None] = None
    again: ClassVar[type[Benchmark] | None] = None

    data: Folder
    images: Folder | None = None
    max_new_tokens: int = Field(1024, ge=1)
    temperature: float = Field(0.0, ge=0, allow_inf_nan=False)
    limit: int | None = Field(None, ge=1)

    _loaded: list[Question] | None = PrivateAttr(default=None)
    _all: int = PrivateAttr(default=0)

    @abstractmethod
    def questions(self) -> list[Question]:
        """The questions, read from ``data``. Raises Fault for a missing or broken file."""

    @abstractmethod
    def score(self, questions: Sequence[Question], answers: Sequence[str], judge: Judge | None = None) -> Score:
        """The score of answers in the order of the questions; ``judge`` is None unless ``judged`` asks for one."""

    @abstractmethod
    def write_official(self, questions: Sequence[Question], answers: Sequence[str], folder: Path) -> Path:
        """Write what the official script reads into ``folder``; return what ``read_answers`` takes."""

    @abstractmethod
    def read_answers(self, file: Path, questions: Sequence[Question]) -> list[str]:
        """The answers of an official file, in the order of the questions. Raises Fault for one that does not fit."""

    def score_file(self, file: Path, questions: Sequence[Question], judge: Judge | None = None) -> Score:
        """The score of an answer file as the official script scores it.

        Override it where that depends on more than one answer for each question: on the file's layout or order, or on
        answers that are missing.
        """
        return self.score(questions, self.answers_in(file, questions), judge)

    def answers_in(self, file: Path, questions: Sequence[Question]) -> list[str]:
        """``read_answers``; where ``questions`` are those of a limit, the file may answer these or all questions."""
        try:
            return self.read_answers(file, questions)
        except Fault:
            if self.limited is None:
                raise
        everything = self.questions()
        answers = {question.id: text for question, text in zip(everything, self.read_answers(file, everything))}
        return [answers[question.id] for question in questions]

    def for_answers(self, file: Path) -> Benchmark:
        """This benchmark, restricted to the questions that an answer file is about; by default all of them."""
        return self

    @classmethod
    def own_prompt(cls) -> dict[str, str]:
        """The texts of the judge's prompt in our own words, by name."""
        return {}

    @classmethod
    def official_prompt(cls, scripts: Mapping[str, str]) -> dict[str, str]:
        """The same texts in the official words, from the content of ``prompt_sources`` by file name.

        Override it together with ``prompt_sources``; see ``povid.benchmarks.wording.Script``.
        """
        return {}

    def notes(self, score: Score) -> list[str]:
        """What a reader of a score must know besides its figures, one sentence each."""
        return []

    @property
    def decoding(self) -> Decoding:
        """How its answers are generated."""
        return Decoding(self.max_new_tokens, self.temperature, self.stop)

    def loaded(self) -> list[Question]:
        """``questions()``, the first alone under a limit.

        They are read once: training may lie between the check before it and the evaluation after it.
        """
        if self._loaded is None:
            questions = self.questions()
            self._all = len(questions)
            self._loaded = questions if self.limit is None else self.first(questions, self.limit)
        return self._loaded

    def first(self, questions: Sequence[Question], count: int) -> list[Question]:
        """The questions about the first ``count`` pictures, in their order; one without a picture counts as a picture.

        Override it where that would separate questions that are scored together, or leave out a column of the tables.
        """
        return first_groups(questions, count, lambda question: question.image or question.id)

    @property
    def limited(self) -> dict[str, int] | None:
        """The limit, and how many questions are asked of how many; None if all of them are."""
        if self.limit is None or (asked := len(self.loaded())) == self._all:
            return None
        return {"limit": self.limit, "asked": asked, "of": self._all}

    def changed(self, **settings: Any) -> Self:
        """The same benchmark with other settings."""
        return type(self)(**dict(self) | settings)

    @classmethod
    def spelling(cls) -> str:
        """What ``python -m povid.benchmarks`` calls it: the module's name among ours, otherwise its dotted path."""
        package, _, module = cls.__module__.rpartition(".")
        return module if package == __package__ else f"{cls.__module__}.{cls.__qualname__}"


def first_groups(questions: Sequence[Question], count: int, key: Callable[[Question], Hashable]) -> list[Question]:
    """The questions of the first ``count`` groups, a group being those of one ``key``, in their order."""
    chosen = set(islice(dict.fromkeys(map(key, questions)), count))
    return [question for question in questions if key(question) in chosen]
