"""ScienceQA: multiple-choice questions of school science; the reported accuracy is that of questions with an image."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from povid.benchmarks import llava_format
from povid.benchmarks.answer_file import read_records
from povid.benchmarks.benchmark import Benchmark, Column, Source, paired
from povid.fault import Fault
from povid.model.question import Question, Score

if TYPE_CHECKING:
    from povid.benchmarks.judge import Judge

SUFFIX = "Answer with the option's letter from the given choices directly."
LETTERS = "ABCDE"
GITHUB = "https://raw.githubusercontent.com/lupantech/ScienceQA/2cbf8318e07b9ece895bb2ae605e71e38d623264/data/scienceqa"


class ScienceQA(Benchmark):
    """``data`` holds problems.json, pid_splits.json, images/SPLIT/ and, if you have it, llava_test_CQM-A.json.

    Attributes:
        split: a split of pid_splits.json.
        image_questions_only: leave out the questions without an image, which the paper's number does not need.
    """

    name: ClassVar[str] = "science_qa"
    official: ClassVar[str] = "haotian-liu/LLaVA llava/eval/eval_science_qa.py"
    columns: ClassVar[tuple[Column, ...]] = (Column("science_qa.img_accuracy", "SciQA-IMG", "high", 1),)
    sources: ClassVar[tuple[Source, ...]] = (
        Source(f"{GITHUB}/problems.json", "problems.json"),
        Source(
            f"{GITHUB}/pid_splits.json",
            "pid_splits.json",
            size=502927,
            sha256="85c7820b9f136e572579a01dab2c77a7f8140b59211e421fa5182491d45ee3a7",
        ),
        Source("https://scienceqa.s3.us-west-1.amazonaws.com/images/test.zip", "test.zip", unpack="images"),
    )
    notice: ClassVar[str] = (
        "LLaVA's own prompts (llava_test_CQM-A.json) are in its eval.zip, behind Google Drive: open "
        "https://drive.google.com/file/d/1atZSBBrAX54yYpxtVVW33zFvcnaHeFPy in a browser, download it, and "
        "put scienceqa/llava_test_CQM-A.json into {data}; without it the same prompts are built from problems.json."
    )

    split: str = "test"
    image_questions_only: bool = False

    def questions(self) -> list[Question]:
        """Questions of the split in its order; prompts from llava_test_CQM-A.json where ``data`` has it, else built.

        Raises Fault for files that are missing or broken and for a split that pid_splits.json does not have.
        """
        data, split = self.data, self.split
        problems = _object(llava_format.needed(self, ["problems.json"]))
        splits = _object(llava_format.needed(self, ["pid_splits.json"]))
        if split not in splits:
            raise Fault(f"{data / 'pid_splits.json'} has no split {split!r}; choose one of {', '.join(splits)}")
        prompts = _prompts(data / f"llava_{split}_CQM-A.json")
        questions = []
        for name in splits[split]:
            if name not in problems:
                raise Fault(
                    f"{data / 'problems.json'} has no question {name}, which pid_splits.json lists; download both again"
                )
            problem = problems[name]
            picture = problem.get("image")
            if self.image_questions_only and not picture:
                continue
            image = None
            if picture:
                folders = [self.images, data / "images" / split, data / "images", data / split]
                image = llava_format.picture(folders, [f"{name}/{picture}"])
            choices, answer, *_ = llava_format.fields(
                f"problems.json question {name}", problem, "choices", "answer", "question", "hint"
            )
            if not (2 <= len(choices) <= len(LETTERS) and answer in range(len(choices))):
                raise Fault(
                    f"problems.json question {name} has {len(choices)} choices and the answer {answer!r}; needed are 2 "
                    f"to {len(LETTERS)} choices and the number of one of them, from 0; download the file again"
                )
            text = f"{prompts.get(name) or cqm(problem)}\n{SUFFIX}"
            questions.append(
                Question(
                    name, image, text, {"choices": choices, "answer": answer, "subject": problem.get("subject", "")}
                )
            )
        return questions

    def read_answers(self, file: Path, questions: Sequence[Question]) -> list[str]:
        """LLaVA's JSON Lines, or the "outputs" of a result file that eval_science_qa.py has written.

        A file that answers only the questions with an image is accepted too: the others count as failed.
        """
        file = Path(file)
        found = _texts(file)
        names, with_image = {name for _, name, _ in found}, [question for question in questions if question.image]
        if with_image and names == {str(question.id) for question in with_image}:
            answers = iter(llava_format.in_order(file, found, with_image))
            return [next(answers) if question.image else "" for question in questions]
        return llava_format.in_order(file, found, questions)

    def score_file(self, file: Path, questions: Sequence[Question], judge: Judge | None = None) -> Score:
        """As the official script, which takes a question without an answer for a failed one without an image.

        So such a question leaves the accuracy of questions with an image; "missing_counted" holds the accuracies with
        those questions counted as wrong, and "missing" their number.
        """
        file = Path(file)
        found = _texts(file)
        if self.limited:  # the file may answer all questions
            asked, known_ids = ({str(question.id) for question in part} for part in (questions, self.questions()))
            found = [entry for entry in found if entry[1] in asked or entry[1] not in known_ids]
        names = {name for _, name, _ in found}
        known = names <= {str(question.id) for question in questions}
        there = [question for question in questions if str(question.id) in names] if known and names else questions
        given = {q.id: text for q, text in zip(there, llava_format.in_order(file, found, there))}
        missing = [question for question in questions if question.id not in given]
        answers = [given.get(question.id, "") for question in questions]
        score = self.score([replace(q, image=q.image if q.id in given else None) for q in questions], answers)
        score.scores["missing"] = len(missing)
        if any(question.image for question in missing):
            counted = self.score(questions, answers).scores
            score.scores["missing_counted"] = {key: counted[key] for key in ("img_accuracy", "accuracy")}
        return score

    def notes(self, score: Score) -> list[str]:
        """How many questions have no answer, and what the official script makes of them."""
        if not score.scores.get("missing"):
            return []
        return [
            f"questions without an answer: {score.scores['missing']}; as in the official script they count as wrong "
            "among all questions and not at all among those with an image"
        ]

    def write_official(self, questions: Sequence[Question], answers: Sequence[str], folder: Path) -> Path:
        """The JSON Lines that eval_science_qa.py scores; image questions have "<image>" in the saved prompt."""
        lines = llava_format.records(questions, answers)
        for line, question in zip(lines, questions):
            line["prompt"] = f"<image>\n{line['prompt']}" if question.image else line["prompt"]
        return llava_format.write_jsonl(Path(folder) / "science_qa_answers.jsonl", lines)

    def score(self, questions: Sequence[Question], answers: Sequence[str], judge: Judge | None = None) -> Score:
        """Accuracies in percent: of the questions with an image (the paper's number) and of all.

        The latter is None where only image questions were asked. A letter beyond the number of choices is wrong.
        "corrected" reads forms of a letter that the official rules miss.
        """
        records = []
        for question, answer in zip(questions, answers, strict=True):
            letters = LETTERS[: len(question.meta["choices"])]
            truth = LETTERS[question.meta["answer"]]
            parsed, corrected = parse(answer), parse_corrected(answer)
            records.append(
                {
                    "id": question.id,
                    "image": bool(question.image),
                    "answer": answer,
                    "parsed": parsed,
                    "truth": truth,
                    "correct": parsed == truth and parsed in letters,
                    "corrected": corrected == truth and corrected in letters,
                    "paired": paired(question.id, {"accuracy": [int(parsed == truth and parsed in letters), 1]}),
                }
            )
        scores = _accuracies(records, "correct")
        scores["failed_to_parse"] = sum(record["parsed"] is None for record in records)
        if any(record["correct"] != record["corrected"] for record in records):
            scores["corrected"] = _accuracies(records, "corrected")
        return Score(scores, records)


def cqm(problem: dict[str, Any]) -> str:
    """As LLaVA's llava_test_CQM-A.json: a context line if there is a hint, the question, one line for each option."""
    lines = [f"Context: {problem['hint']}"] if problem["hint"].strip() else []
    lines.append(problem["question"])
    lines += [f"{letter}. {choice}" for letter, choice in zip(LETTERS, problem["choices"])]
    return "\n".join(lines).strip()


def parse(answer: str) -> str | None:
    """The letter that the official script reads: "B", "B. ...", or exactly one "The answer is B" + any character."""
    if len(answer) == 1 and answer in LETTERS:
        return answer
    if len(answer) >= 3 and answer[0] in LETTERS and answer[1:3] == ". ":
        return answer[0]
    found = re.findall(r"The answer is ([A-Z]).", answer)
    return found[0] if len(found) == 1 else None


def parse_corrected(answer: str) -> str | None:
    """As ``parse``, but "B.", "(B)", "(B) ...", "B) ...", "B: ..." and "the answer is B" at the end are read too."""
    start = re.match(r"\s*(?:\(([A-E])\)|([A-E])(?=[.):,]|\s*$))", answer)
    if start:
        return start[1] or start[2]
    found = set(re.findall(r"[Tt]he answer is:? \(?([A-E])\b", answer))
    return found.pop() if len(found) == 1 else None


def _accuracies(records: Sequence[dict[str, Any]], key: str) -> dict[str, Any]:
    right = [record[key] for record in records]
    image = [record[key] for record in records if record["image"]]
    return {
        "img_accuracy": 100 * sum(image) / len(image) if image else None,
        "accuracy": 100 * sum(right) / len(right) if len(image) < len(right) else None,
        "img_questions": len(image),
        "questions": len(right),
    }


def _texts(file: Path) -> list[tuple[str, str, Any]]:
    """(place, question's id, answer) of LLaVA's JSON Lines, or of a result file of eval_science_qa.py."""
    rows = read_records(file)
    if len(rows) == 1 and isinstance(rows[0][1], dict) and isinstance(rows[0][1].get("outputs"), dict):
        return [(f"{file.name} outputs {name}", name, text) for name, text in rows[0][1]["outputs"].items()]
    return list(llava_format.texts(file))


def _object(file: Path) -> dict[str, Any]:
    found = read_records(file)
    if len(found) != 1 or not isinstance(found[0][1], dict):
        raise Fault(f"{file} is not a single JSON object; download it again")
    return found[0][1]


def _prompts(file: Path) -> dict[str, str]:
    if not file.exists():
        return {}
    prompts = {}
    for place, record in read_records(file):
        name, turns = llava_format.fields(place, record, "id", "conversations")
        prompts[str(name)] = turns[0]["value"].replace("<image>", "").strip()
    return prompts
