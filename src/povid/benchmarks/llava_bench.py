"""LLaVA-Bench (in the wild): 60 open questions; a judge rates our answer beside GPT-4's. Table 4 is its breakdown."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from povid.benchmarks import llava_format
from povid.benchmarks.answer_file import read_records
from povid.benchmarks.benchmark import Benchmark, Column, Source
from povid.benchmarks.judge import Judge, required, unreadable
from povid.fault import Fault
from povid.model.question import Question, Score
from povid.server.endpoint import Request

HUB = "https://huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild/resolve/main"
FILES = ("questions.jsonl", "context.jsonl", "answers_gpt4.jsonl")
WHAT = "replies without two finite numbers in their first line are left out; officially they count as -1 for both"
BY_ID = "each answer to the question that its id names, where the official script counts by line"
CATEGORIES = ("conv", "detail", "complex")


class LLaVABench(Benchmark):
    """``data`` holds questions.jsonl, context.jsonl, answers_gpt4.jsonl and images/."""

    name: ClassVar[str] = "llava_bench"
    official: ClassVar[str] = (
        "haotian-liu/LLaVA llava/eval/eval_gpt_review_bench.py, summarize_gpt_review.py (gpt-4-0314)"
    )
    columns: ClassVar[tuple[Column, ...]] = (Column("llava_bench.overall", "LLaVA-Bench", "high", 1),)
    sources: ClassVar[tuple[Source, ...]] = (
        *(Source(f"{HUB}/{name}", name) for name in FILES),
        *(Source(f"{HUB}/images/{number:03d}.jpg", f"images/{number:03d}.jpg") for number in range(1, 25)),
    )
    judged: ClassVar[Literal["never", "optional", "always"]] = "always"
    official_judge: ClassVar[str] = "gpt-4-0314"
    wording: ClassVar[str] = "povid-1"

    def questions(self) -> list[Question]:
        """Questions without a suffix, each with its context and GPT-4's reference answer.

        The official script pairs questions and references by line; here they are paired by question_id, and Fault is
        raised where the two files disagree.
        """
        files = [llava_format.needed(self, [name]) for name in FILES]
        captions: dict[str, str] = {}
        for place, record in read_records(files[1]):
            image, caption = llava_format.fields(place, record, "image", "caption")
            captions[image] = "\n".join(caption) if isinstance(caption, list) else caption
        references = {name: text for _, name, text in llava_format.texts(files[2])}
        questions = []
        for place, record in read_records(files[0]):
            name, image, text, category = llava_format.fields(place, record, "question_id", "image", "text", "category")
            if image not in captions or str(name) not in references or category not in CATEGORIES:
                raise Fault(
                    f"{place} asks question {name} ({category}) about {image}, but its image is not in context.jsonl, "
                    "its question_id not in answers_gpt4.jsonl, or its category not one of conv, detail and complex; "
                    "download the files again"
                )
            questions.append(
                Question(
                    name,
                    llava_format.picture([self.images, self.data / "images"], [image]),
                    text,
                    {"category": category, "context": captions[image], "reference": references[str(name)]},
                )
            )
        return questions

    def read_answers(self, file: Path, questions: Sequence[Question]) -> list[str]:
        """Answers from LLaVA's JSON Lines."""
        return llava_format.by_question_id(Path(file), questions)

    def write_official(self, questions: Sequence[Question], answers: Sequence[str], folder: Path) -> Path:
        """LLaVA's JSON Lines, which eval_gpt_review_bench.py reads line by line in the order of questions.jsonl."""
        return llava_format.write_jsonl(
            Path(folder) / "llava_bench_answers.jsonl", llava_format.records(questions, answers)
        )

    def score_file(self, file: Path, questions: Sequence[Question], judge: Judge | None = None) -> Score:
        """The figures of the official script, which pairs answers with questions by line, to the end of the file.

        Answers may be missing: "unanswered" counts them, and no figure includes their questions. Where ids say another
        order than the lines, or answers are missing before the last, "by_id" holds the figures of the answers as their
        ids say. Raises Fault where ``read_answers`` does, except for missing answers, and for a file without any.
        """
        found = list(llava_format.texts(Path(file)))
        by_id = [
            (q, answer) for q, answer in zip(questions, llava_format.matched(found, questions)) if answer is not None
        ]
        if not found:
            raise Fault(f"{file} holds no answer; give the answers to be scored")
        by_line = [(question, answer) for question, (_, _, answer) in zip(questions, found)]
        score = self.score([question for question, _ in by_line], [answer for _, answer in by_line], judge)
        if len(found) < len(questions):
            score.scores["unanswered"] = len(questions) - len(found)
        if by_line != by_id:
            own = self.score([question for question, _ in by_id], [answer for _, answer in by_id], judge).scores
            score.scores["by_id"] = {name: value for name, value in own.items() if name != "judge"} | {"what": BY_ID}
        return score

    def notes(self, score: Score) -> list[str]:
        """What is missing, what stands in another order, and how many replies could not be read."""
        scores, notes = score.scores, []
        if count := scores.get("unanswered"):
            notes.append(f"questions without an answer: {count}; officially they are left out of every figure")
        if "by_id" in scores:
            notes.append(
                "by their ids the answers are not in the order of the questions, or some are missing; the official "
                "script counts by line, so its figures are of answers to other questions: by_id has the right ones "
                f"(overall {scores['by_id']['overall']})"
            )
        if count := scores["unreadable_replies"]:
            notes.append(
                f"replies of the judge that could not be read: {count}; officially each counts as -1 for both answers"
            )
        return notes

    def score(self, questions: Sequence[Question], answers: Sequence[str], judge: Judge | None = None) -> Score:
        """100 x mean score of ours / mean score of the reference, overall and for each category, one decimal.

        Officially a reply whose first line is not two numbers counts as -1 for both and stays in the means; "corrected"
        leaves it out, and has None for a category without any readable reply. A rating of nan or infinity is a number
        to the official script; where it prints no finite number for that, the corrected figure takes its place.
        Raises Fault when no reply at all can be read.
        """
        judge = required(self, judge)
        requests = [
            request(
                f"llava_bench question {question.id}",
                question.meta["context"],
                question.text,
                question.meta["reference"],
                answer,
            )
            for question, answer in zip(questions, answers, strict=True)
        ]
        replies = [reply.text for reply in judge.ask(self, requests)]
        pairs = [parse(reply) for reply in replies]
        if not any(pairs):
            raise unreadable(self, judge, len(replies))
        official = _figures(questions, [_numbers(reply) or (-1.0, -1.0) for reply in replies])
        corrected = _figures(questions, pairs)
        scores = {name: corrected.get(name) if figure is None else figure for name, figure in official.items()}
        scores["unreadable_replies"] = pairs.count(None)
        if None in pairs:
            scores["corrected"] = dict.fromkeys(official) | corrected | {"what": WHAT}
        records = [
            {
                "id": question.id,
                "category": question.meta["category"],
                "answer": answer,
                "scores": list(pair) if pair else None,
                "judge_reply": reply,
            }
            for question, answer, pair, reply in zip(questions, answers, pairs, replies)
        ]
        return Score({**scores, "judge": judge.describe(self)}, records)


def _figures(questions: Sequence[Question], pairs: Sequence[tuple[float, float] | None]) -> dict[str, Any]:
    """Ratios and means of the pairs that are there; None for one that is not a finite number."""
    rows: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for question, pair in zip(questions, pairs):
        if pair is not None:
            rows["overall"].append(pair)
            rows[question.meta["category"]].append(pair)
    means = {name: [round(mean, 3) for mean in np.asarray(values).mean(0).tolist()] for name, values in rows.items()}
    ratios = {
        name: _finite(round(ours / theirs * 100, 1)) if theirs else None for name, (theirs, ours) in means.items()
    }
    times_ten = {
        name: {"reference": _finite(round(theirs * 10, 1)), "model": _finite(round(ours * 10, 1))}
        for name, (theirs, ours) in means.items()
    }
    return {**ratios, "means_x10": times_ten, "questions": len(questions)}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


SYSTEM = "You are a precise and helpful assistant who checks the quality of answers."
RULE = (  # one text for conv, detail and complex, as in the official rule file
    "Please judge the answers that two AI assistants gave to the user's question shown above. The user asks about an "
    "image, which is given to you as a few sentences that describe it.\n"
    "Rate how helpful, relevant, accurate and detailed each answer is. Each assistant gets an overall score from 1 to "
    "10; a higher score means a better answer.\n"
    "Write a first line that holds only two numbers, the scores of Assistant 1 and Assistant 2 in this order, "
    "separated by a space.\n"
    "From the next line on explain your judgement in full, without bias and without letting the order of the answers "
    "influence it."
)


def request(name: str, context: str, question: str, reference: str, answer: str) -> Request:
    """LLaVA llava/eval/eval_gpt_review_bench.py: five blocks, the reference first, temperature 0.2, max_tokens 1024."""
    text = (
        f"[Context]\n{context}\n\n[Question]\n{question}\n\n"
        f"[Assistant 1]\n{reference}\n\n[End of Assistant 1]\n\n"
        f"[Assistant 2]\n{answer}\n\n[End of Assistant 2]\n\n[System]\n{RULE}\n\n"
    )
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
    return Request(messages, temperature=0.2, max_tokens=1024, name=name)


def parse(reply: str) -> tuple[float, float] | None:
    """(reference's score, model's score) of the first line; None unless it is two finite numbers.

    Commas become spaces and the line is split at single spaces, so "8,9" is read and "8, 9" is not.
    """
    pair = _numbers(reply)
    return pair if pair and all(map(math.isfinite, pair)) else None


def _numbers(reply: str) -> tuple[float, float] | None:
    """As the official script reads a reply: "nan" and "inf" are numbers; None is officially (-1, -1)."""
    parts = reply.split("\n")[0].replace(",", " ").split(" ")
    try:
        return (float(parts[0]), float(parts[1])) if len(parts) == 2 else None
    except ValueError:
        return None
