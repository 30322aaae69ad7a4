"""A benchmark: short questions, each with one right answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from povid.benchmarks import llava_format
from povid.benchmarks.answer_file import read_records
from povid.benchmarks.benchmark import Benchmark, Column
from povid.model.question import Question, Score

if TYPE_CHECKING:
    from povid.benchmarks.judge import Judge


class ExactMatch(Benchmark):
    """``data`` holds questions.json, a list of {"image", "question", "answer"}, and the folder pictures/."""

    name: ClassVar[str] = "exact_match"
    official: ClassVar[str] = "mine.exact_match; there is no official script"
    columns: ClassVar[tuple[Column, ...]] = (Column("exact_match.accuracy", "Exact match", "high", 1),)

    max_new_tokens: int = Field(16, ge=1)

    def questions(self) -> list[Question]:
        """Numbered from 0 in the order of the file. Raises Fault for a missing file or an incomplete record."""
        file = llava_format.needed(self, ["questions.json"])
        questions = []
        for number, (place, record) in enumerate(read_records(file)):
            image, text, answer = llava_format.fields(place, record, "image", "question", "answer")
            path = (self.images or self.data / "pictures") / image
            questions.append(Question(number, path, text, {"answer": answer}))
        return questions

    def score(self, questions: Sequence[Question], answers: Sequence[str], judge: Judge | None = None) -> Score:
        """Percent of the answers that are the right one, whatever their case, outer spaces and final full stop."""
        records = [
            {"id": question.id, "answer": answer, "correct": _plain(answer) == _plain(question.meta["answer"])}
            for question, answer in zip(questions, answers, strict=True)
        ]
        accuracy = 100 * sum(record["correct"] for record in records) / len(records)
        return Score({"accuracy": accuracy, "questions": len(records)}, records)

    def write_official(self, questions: Sequence[Question], answers: Sequence[str], folder: Path) -> Path:
        """LLaVA's answer records, one line each."""
        return llava_format.write_jsonl(folder / "answers.jsonl", llava_format.records(questions, answers))

    def read_answers(self, file: Path, questions: Sequence[Question]) -> list[str]:
        """What ``write_official`` wrote, or any file of {"question_id", "text"}."""
        return llava_format.by_question_id(file, questions)


def _plain(text: str) -> str:
    return text.strip().removesuffix(".").casefold()
