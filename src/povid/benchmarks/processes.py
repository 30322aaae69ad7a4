"""The processes that answer questions together: one, unless a run has several (``povid.run.processes.Group``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from povid.fault import Fault
from povid.model.question import Answerer, Decoding, Question


class ProcessFailed(Fault):
    """Another process of the run failed, so this one cannot go on either."""


class Processes:
    """A single process; several override all methods.

    Attributes:
        number: of this process, from 0.
        of: how many there are.
    """

    number: int = 0
    of: int = 1

    def exchange(self, value: Any) -> list[Any]:
        """Every process's value, in the order of the processes. All of them must call it."""
        return [value]

    @contextmanager
    def together(self) -> Iterator[None]:
        """All processes enter and leave; what is raised inside one is raised in all of them.

        Raises:
            Fault: the first that a process raised.
            ProcessFailed: another process failed otherwise, or has ended.
        """
        yield

    def check(self) -> None:
        """Raise ProcessFailed if another process has failed since; it costs next to nothing."""

    @contextmanager
    def training(self) -> Iterator[None]:
        """Inside, the processes train together: all of them end if one does."""
        yield

    def ask(self, answer: Answerer, questions: Sequence[Question], decoding: Decoding) -> list[str]:
        """The answers to questions of which every process answers its share. All of them must call it."""
        with self.together():
            own = dict(answer(questions, decoding)) if questions else {}
        said = {index: text for part in self.exchange(own) for index, text in part.items()}
        return [said[index] for index in range(len(questions))]


ALONE = Processes()
