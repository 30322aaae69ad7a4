"""MM-Vet: 218 open questions, each needing a set of capabilities, graded 0.0 to 1.0 by a judge."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from povid.benchmarks import judge as judging
from povid.benchmarks import llava_format
from povid.benchmarks.answer_file import read_records, write_text
from povid.fault import Fault
from povid.model.question import Decoding, Question, Score

DECODING = Decoding(max_new_tokens=1024)
OFFICIAL = "yuweihao/MM-Vet mm-vet_evaluator.py (gpt-4-0613)"
FILES = ("mm-vet.json", "images/")


def load(data: Path, images: Path | None = None) -> list[Question]:
    """Questions of mm-vet.json in its order, without a suffix; ``data`` is the unpacked mm-vet folder."""
    data = Path(data)
    data = data / "mm-vet" if (data / "mm-vet" / "mm-vet.json").is_file() else data
    file = llava_format.needed(data, ["mm-vet.json"], "mm_vet")
    found = read_records(file)
    if len(found) != 1 or not isinstance(found[0][1], dict):
        raise Fault(f"{file} holds no single JSON object; fetch it again.")
    questions = []
    for name, record in found[0][1].items():
        image, text, answer, capability = llava_format.fields(
            f"{file.name} {name}", record, "imagename", "question", "answer", "capability"
        )
        picture = llava_format.picture([images, data / "images"], [image])
        questions.append(Question(name, picture, text, {"answer": answer, "capability": sorted(set(capability))}))
    return questions


def read_answers(file: Path, questions: Sequence[Question]) -> list[str]:
    """Answers from the official JSON object {"v1_0": text}, or from LLaVA's JSON Lines with 0 for v1_0."""
    file = Path(file)
    found = read_records(file)
    if len(found) == 1 and isinstance(found[0][1], dict) and "question_id" not in found[0][1]:
        return llava_format.in_order(
            file, [(f"{file.name} {name}", name, answer) for name, answer in found[0][1].items()], questions
        )
    return llava_format.in_order(
        file,
        [
            (place, name if name.startswith("v1_") else f"v1_{name}", answer)
            for place, name, answer in llava_format.texts(file)
        ],
        questions,
    )


def write_official(questions: Sequence[Question], answers: Sequence[str], folder: Path) -> Path:
    """The JSON object that the official evaluator and its online form take."""
    file = Path(folder) / "mm_vet_answers.json"
    write_text(
        file, json.dumps({question.id: answer for question, answer in zip(questions, answers, strict=True)}, indent=4)
    )
    return file


def score(questions: Sequence[Question], answers: Sequence[str], judge: judging.Judge, runs: int = 1) -> Score:
    """100 x mean grade: in total, of the questions that need a capability, and of each exact set of capabilities.

    Means over ``runs`` gradings, one decimal as the official script rounds; "std" is that of the totals. Officially an
    answer whose grade could not be read in five tries gets 0; "corrected" leaves it out. Raises Fault when no grade at
    all can be read.
    """
    items = [
        (f"mm_vet question {question.id}", question.text, question.meta["answer"], answer)
        for question, answer in zip(questions, answers, strict=True)
    ]
    grades = [judging.mm_vet_grades(judge, items, run) for run in range(runs)]
    unread = sum(grade is None for run in grades for grade in run)
    if unread == runs * len(items):
        raise judging.unreadable("mm_vet", judge, unread)
    scores = _figures(questions, [[grade or 0.0 for grade in run] for run in grades])
    scores["unreadable_grades"] = unread
    if unread:
        scores["corrected"] = _figures(questions, grades)
    records = [
        {
            "id": question.id,
            "answer": answer,
            "grades": [run[number] for run in grades],
            "capability": question.meta["capability"],
        }
        for number, (question, answer) in enumerate(zip(questions, answers))
    ]
    return Score({**scores, "judge": {**judge.describe("mm_vet"), "runs": runs}}, records)


def _figures(questions: Sequence[Question], grades: Sequence[Sequence[float | None]]) -> dict[str, Any]:
    parts: dict[str, dict[str, list[list[float]]]] = {
        "by_capability": defaultdict(list),
        "by_integration": defaultdict(list),
        "": defaultdict(list),
    }
    for run in grades:
        sums: dict[tuple[str, str], list[float]] = defaultdict(list)
        for question, grade in zip(questions, run):
            if grade is not None:
                needs = question.meta["capability"]
                for place in [
                    ("", "total"),
                    ("by_integration", "_".join(needs)),
                    *(("by_capability", one) for one in needs),
                ]:
                    sums[place].append(grade)
        for (part, name), values in sums.items():
            parts[part][name].append(sum(values) / len(values) * 100)
    totals = np.array(parts[""]["total"])
    rounded = {
        part: {name: float(round(np.mean(values), 1)) for name, values in sorted(names.items())}
        for part, names in parts.items()
        if part
    }
    return {
        "total": float(round(totals.mean(), 1)),
        "std": float(round(totals.std(), 1)),
        **rounded,
        "questions": len(questions),
    }
