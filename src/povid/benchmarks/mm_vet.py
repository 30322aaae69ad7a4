"""MM-Vet: 218 open questions, each needing a set of capabilities, graded 0.0 to 1.0 by a judge."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from povid.benchmarks import llava_format
from povid.benchmarks.answer_file import read_records
from povid.benchmarks.benchmark import Benchmark, Column, Source
from povid.benchmarks.calibrate import Calibrated, Published, Rating, Ratings, by_question, graded_file, nanmean, source
from povid.benchmarks.judge import Judge, required, unreadable
from povid.benchmarks.wording import Script
from povid.fault import Fault
from povid.files import write_text
from povid.model.question import Question, Score
from povid.server.endpoint import Request


class MMVet(Benchmark, Calibrated):
    """``data`` holds mm-vet.json and images/, or the folder mm-vet with both. ``runs`` gradings are averaged."""

    name: ClassVar[str] = "mm_vet"
    official: ClassVar[str] = "yuweihao/MM-Vet mm-vet_evaluator.py (gpt-4-0613)"
    columns: ClassVar[tuple[Column, ...]] = (Column("mm_vet.total", "MM-Vet", "high", 1),)
    sources: ClassVar[tuple[Source, ...]] = (
        Source("https://github.com/yuweihao/MM-Vet/releases/download/v1/mm-vet.zip", "mm-vet.zip", unpack="."),
    )
    notice: ClassVar[str] = "MM-Vet's data is CC BY-NC 4.0: for research, not for commercial use."
    judged: ClassVar[Literal["never", "optional", "always"]] = "always"
    official_judge: ClassVar[str] = "gpt-4-0613"
    wording: ClassVar[str] = "povid-1"
    prompt_sources: ClassVar[tuple[Source, ...]] = (
        Source(
            "https://raw.githubusercontent.com/yuweihao/MM-Vet/acde843e02dae30047bb456ee4a8ab28dee7e0ae/"
            "mm-vet_evaluator.py",
            "judge/mm-vet_evaluator.py",
            15232,
            "68cfd25dc1c83d9dbf695c86854749083fc3899398ef88ca2d70cea3ddd82cbf",
        ),
    )
    graded: ClassVar[tuple[Source, ...]] = (
        source(
            "mm-vet/results/llava-v1.5-7b.json",
            70506,
            "b028bccb78a827761898f96f7221c2830b9cca6d2202304a5dc8b286f169b63c",
        ),
        source(
            "mm-vet/results/llava-v1.5-7b_gpt-4-grade-1runs.json",
            36516,
            "24f2072f86290ddaa7c5e91dd0fab5157ffb7f36a40018b5bb6d6283b13a24cf",
        ),
        source(
            "mm-vet/results/llava-v1.5-7b_gpt-4-grade-3runs.json",
            61368,
            "744e7f9f8013fa7dd24a255eff70635a4f719398c7f54473eddadf1392b5bbcb",
        ),
        source(
            "mm-vet/results/llava-v1.5-13b.json",
            74461,
            "0e36bdbc09f792cceae47567ea2f25d9d1366cdb2063748f6076d383ce9a7886",
        ),
        source(
            "mm-vet/results/llava-v1.5-13b_gpt-4-grade-1runs.json",
            36516,
            "f6cf024f900bf66c41cf20281fcce110756795df70e660e77f2924ff904ad7e5",
        ),
        source(
            "mm-vet/results/llava-v1.5-13b_gpt-4-grade-3runs.json",
            61368,
            "437a80db3349d87aa4424830710dd3755059a3831b47d783df4f69f3e0720b54",
        ),
    )

    runs: int = Field(1, ge=1)

    @classmethod
    def own_prompt(cls) -> dict[str, str]:
        """The table up to the open row, and the line that insists on a number."""
        return {"prompt": PROMPT, "insist": INSIST}

    @classmethod
    def official_prompt(cls, scripts: Mapping[str, str]) -> dict[str, str]:
        """The prompt of mm-vet_evaluator.py, and what it appends when a grade cannot be read."""
        script = Script("mm-vet_evaluator.py", scripts["mm-vet_evaluator.py"])
        return {"prompt": script.assigned("prompt"), "insist": script.inside("runs").appended()}

    def questions(self) -> list[Question]:
        """Questions of mm-vet.json in its order, without a suffix."""
        file = llava_format.needed(self, ["mm-vet/mm-vet.json", "mm-vet.json"])
        found = read_records(file)
        if len(found) != 1 or not isinstance(found[0][1], dict):
            raise Fault(f"{file} is not a single JSON object; download it again")
        questions = []
        for name, record in found[0][1].items():
            image, text, answer, capability = llava_format.fields(
                f"{file.name} {name}", record, "imagename", "question", "answer", "capability"
            )
            picture = llava_format.picture([self.images, file.parent / "images"], [image])
            questions.append(Question(name, picture, text, {"answer": answer, "capability": sorted(set(capability))}))
        return questions

    def read_answers(self, file: Path, questions: Sequence[Question]) -> list[str]:
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

    def write_official(self, questions: Sequence[Question], answers: Sequence[str], folder: Path) -> Path:
        """The JSON object that the official evaluator and its online form take."""
        given = {question.id: answer for question, answer in zip(questions, answers, strict=True)}
        return write_text(Path(folder) / "mm_vet_answers.json", json.dumps(given, indent=4))

    def score(self, questions: Sequence[Question], answers: Sequence[str], judge: Judge | None = None) -> Score:
        """100 x mean grade: in total, of the questions that need a capability, and of each exact set of capabilities.

        Means over ``runs`` gradings, one decimal as the official script rounds; "std" is that of the totals. Officially
        an answer whose grade could not be read in five tries gets 0; "corrected" leaves it out. A grade of nan is one
        to the official script, and every figure that it enters is nan; there the corrected figure takes its place.
        Raises Fault when no grade at all can be read.
        """
        judge = required(self, judge)
        items = [
            (f"mm_vet question {question.id}", question.text, question.meta["answer"], answer)
            for question, answer in zip(questions, answers, strict=True)
        ]
        grades = [self._grades(judge, items, run) for run in range(self.runs)]
        read = [[None if grade is None or math.isnan(grade) else grade for grade in run] for run in grades]
        unread = sum(grade is None for run in read for grade in run)
        if unread == self.runs * len(items):
            raise unreadable(self, judge, unread)
        scores = _figures(questions, [[0.0 if grade is None else grade for grade in run] for run in grades])
        if unread:
            corrected = _figures(questions, read)
            scores = _finite(scores, corrected)
            scores["corrected"] = corrected
        scores["unreadable_grades"] = unread
        scores["nan_grades"] = unread - sum(grade is None for run in grades for grade in run)
        records = [
            {
                "id": question.id,
                "answer": answer,
                "grades": [run[number] for run in read],
                "capability": question.meta["capability"],
            }
            for number, (question, answer) in enumerate(zip(questions, answers))
        ]
        described = judge.describe(self)
        described["judge"]["runs"] = self.runs
        return Score({**scores, **described}, records)

    def published(self, questions: Sequence[Question]) -> list[Published]:
        """LLaVA-1.5 7B and 13B, four gradings of each by gpt-4."""
        sets = []
        for model in ("llava-v1.5-7b", "llava-v1.5-13b"):
            answers = self._object(f"{model}.json", questions)
            gradings: list[list[Rating]] = []
            for runs in (1, 3):
                name = f"{model}_gpt-4-grade-{runs}runs.json"
                graded = self._object(name, questions)
                try:
                    gradings += [[{"grade": float(one["score"][run])} for one in graded] for run in range(runs)]
                except (KeyError, IndexError, TypeError, ValueError) as error:
                    raise Fault(f"{name} has no {runs} grades of each answer ({error!r}); fetch it again") from None
            sets.append(Published(model, answers, gradings))
        return sets

    def _object(self, name: str, questions: Sequence[Question]) -> list[Any]:
        file = graded_file(self, name)
        found = read_records(file)
        if len(found) != 1 or not isinstance(found[0][1], dict):
            raise Fault(f"{file} is not a single JSON object; fetch it again")
        return by_question(self, questions, file, [(name, key, value) for key, value in found[0][1].items()])

    def rating(self, record: Mapping[str, Any]) -> Rating:
        """The mean grade, 0 to 1."""
        grades = [grade for grade in record["grades"] if grade is not None]
        return {"grade": sum(grades) / len(grades)} if grades else {}

    def figure(self, ratings: Ratings) -> np.ndarray:
        """100 x the mean grade."""
        return 100 * nanmean(ratings["grade"], axis=-1)

    def kinds(self, question: Question) -> list[str]:
        """Its capabilities."""
        return list(question.meta["capability"])

    def notes(self, score: Score) -> list[str]:
        """How many grades could not be read, and what the official script makes of them."""
        scores, notes = score.scores, []
        if count := scores["unreadable_grades"] - scores["nan_grades"]:
            notes.append(f"grades that could not be read in {len(TEMPERATURES)} tries: {count}; officially each is 0")
        if count := scores["nan_grades"]:
            notes.append(
                f"grades of nan: {count}; the official script prints nan for every figure that they enter, and the "
                "figure here leaves them out"
            )
        return notes

    def _grades(self, judge: Judge, items: Sequence[tuple[str, str, str, str]], run: int) -> list[float | None]:
        """Grades of (name, question, ground truth, prediction); five unreadable replies give None (officially 0)."""
        words = judge.words(self).parts
        grades: list[float | None] = [None] * len(items)
        for attempt in range(len(TEMPERATURES)):
            ungraded = [number for number, grade in enumerate(grades) if grade is None]
            requests = [request(words, *items[number], attempt=attempt, run=run) for number in ungraded]
            for number, reply in zip(ungraded, judge.ask(self, requests) if requests else []):
                grades[number] = parse(reply.text)
        return grades


def _figures(questions: Sequence[Question], grades: Sequence[Sequence[float | None]]) -> dict[str, Any]:
    parts: dict[str, dict[str, list[float]]] = {
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
            parts[part][name].append(_added(values) / len(values) * 100)
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


def _finite(official: dict[str, Any], corrected: dict[str, Any]) -> dict[str, Any]:
    """The official figures, and the corrected ones where those are nan; None where nothing is left of either."""
    found: dict[str, Any] = {}
    for name, figure in official.items():
        if isinstance(figure, dict):
            found[name] = _finite(figure, corrected[name])
        else:
            found[name] = corrected.get(name) if math.isnan(figure) else figure
    return found


def _added(values: Sequence[float]) -> float:
    """The sum as repeated +=, which the official script uses: from Python 3.12 on, sum() rounds differently."""
    total = 0.0
    for value in values:
        total += value
    return total


_ICE = (
    "The meme makes fun of the misleading names of two countries: Greenland is mostly ice while Iceland is green. "
    "Its speaker says that this is why he finds it hard to trust."
)
_ROWS = (
    ("Which x solve the equation?", "2 <AND> -7", "x = 4", "0.0"),
    ("Which x solve the equation?", "2 <AND> -7", "x = 2", "0.5"),
    ("Which x solve the equation?", "2 <AND> -7", "x = -7", "0.5"),
    ("Which x solve the equation?", "2 <AND> -7", "x = -7 or 7", "0.5"),
    ("Which x solve the equation?", "2 <AND> -7", "x = 2 or x = -7", "1.0"),
    (
        "Why is this meme funny?",
        _ICE,
        "The meme is about Iceland and Greenland. One is not as icy and the other not as green as its name says.",
        "0.4",
    ),
    (
        "Why is this meme funny?",
        _ICE,
        "The meme jokes that the names of Iceland and Greenland mislead: Iceland has "
        "green land and Greenland is covered in ice. The line about trust issues says, tongue in cheek, that such "
        "contradictions make one doubt what one is told. The humour lies in the contrast of name and country.",
        "1.0",
    ),
)
PROMPT = "\n".join(
    [
        "Compare the prediction of a model with the ground truth and grade how correct it is. <AND> in the ground "
        "truth means that the prediction is entirely right only if it has all of the elements; <OR> means that any one "
        "of them is enough. The grade is 0.0 (entirely wrong), 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9 or 1.0 "
        "(entirely right). Fill in only the last cell, the grade.",
        "",
        "Question | Ground truth | Prediction | Correctness",
        "--- | --- | --- | ---",
        *(" | ".join(row) for row in _ROWS),
        "",
    ]
)
INSIST = "\nGive the correctness of the prediction as a number (digit): "
TEMPERATURES = (0.0, 0.0, 0.5, 1.0, 1.5)  # of the first question and of those that insist; then the grade is 0


def request(
    words: Mapping[str, str], name: str, question: str, truth: str, prediction: str, attempt: int, run: int
) -> Request:
    """MM-Vet mm-vet_evaluator.py: a table whose last cell is open, max_tokens 3; attempts after the first insist."""
    truth = truth.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    text = words["prompt"] + "\n" + " | ".join([question, truth, prediction, ""]) + words["insist"] * bool(attempt)
    return Request(
        [{"role": "user", "content": text}],
        temperature=TEMPERATURES[attempt],
        max_tokens=3,
        sample=run,
        name=name,
        reads=lambda reply: parse(reply.text),
    )


def parse(reply: str) -> float | None:
    """What stands before the first space, as a number in [0, 1]; None if it is none (also for a leading space).

    "nan" is one, as in the official script.
    """
    try:
        grade = float(reply.split(" ")[0].strip())
    except ValueError:
        return None
    return None if grade < 0.0 or grade > 1.0 else grade  # compared so, as officially, nan is a grade
