"""MMHal-Bench: 96 questions of 8 types that provoke hallucination, rated 0 to 6 by a judge that sees no image."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from povid.benchmarks import judge as judging
from povid.benchmarks import llava_format
from povid.benchmarks.answer_file import read_records, write_text
from povid.model.question import Decoding, Question, Score

DECODING = Decoding(max_new_tokens=1024)
OFFICIAL = "llava-rlhf/LLaVA-RLHF Eval/eval_gpt_mmhal.py (gpt-4-0314, text only)"
FILES = ("response_template.json", "images/")
TEMPLATES = ("response_template.json", "mmhal-bench_answer_template.json")


def load(data: Path, images: Path | None = None) -> list[Question]:
    """Questions of the official response template, without a suffix; pictures by the last part of their address."""
    data = Path(data)
    questions = []
    for number, (place, record) in enumerate(read_records(llava_format.needed(data, TEMPLATES, "mmhal"))):
        text, source, *_ = llava_format.fields(
            place, record, "question", "image_src", "image_id", "gt_answer", "image_content", "question_type"
        )
        folders = [images, data / "images", data / "test_data" / "images", data]
        picture = llava_format.picture(folders, [source.rsplit("/", 1)[-1]])
        questions.append(Question(number, picture, text, {"record": record}))
    return questions


def read_answers(file: Path, questions: Sequence[Question]) -> list[str]:
    """Answers from the filled template (``model_answer``), or from LLaVA's JSON Lines with the row as question_id."""
    file = Path(file)
    if any(isinstance(record, dict) and "question_id" in record for _, record in read_records(file)):
        return llava_format.by_question_id(file, questions)

    def found() -> Iterable[tuple[str, str, Any]]:
        for place, record in read_records(file):
            names = ("image_id", "question", "model_answer")
            image, text, answer = llava_format.fields(place, record, *names)
            yield place, f"{image} {text}", answer

    return llava_format.in_order(
        file, found(), questions, lambda question: f"{question.meta['record']['image_id']} {question.text}"
    )


def write_official(questions: Sequence[Question], answers: Sequence[str], folder: Path) -> Path:
    """The response template with ``model_answer`` filled in, which the official script judges."""
    filled = [
        {**question.meta["record"], "model_answer": answer} for question, answer in zip(questions, answers, strict=True)
    ]
    file = Path(folder) / "mmhal_responses.json"
    write_text(file, json.dumps(filled, indent=2))
    return file


def score(questions: Sequence[Question], answers: Sequence[str], judge: judging.Judge) -> Score:
    """Mean rating (0 to 6), hallucination rate (share of ratings below 3) and the mean of each question type.

    Officially a reply with no rating or with several different ones counts 0; "corrected" reads the last rating a reply
    states and leaves out replies without any. Raises Fault when no reply at all can be read.
    """
    requests = []
    for question, answer in zip(questions, answers, strict=True):
        record = question.meta["record"]
        contents = record["image_content"]
        contents = contents["class"] if isinstance(contents, dict) else contents  # as a data set loader gives them
        requests.append(
            judging.mmhal_request(f"mmhal question {question.id}", contents, question.text, record["gt_answer"], answer)
        )
    replies = [reply.text for reply in judge.ask("mmhal", requests)]
    official = [judging.mmhal_rating(reply) for reply in replies]
    corrected = [judging.mmhal_last_rating(reply) for reply in replies]
    if not any(rating is not None for rating in official + corrected):
        raise judging.unreadable("mmhal", judge, len(replies))
    types = [question.meta["record"]["question_type"] for question in questions]
    scores = _figures(types, [rating or 0 for rating in official])
    scores["unreadable_replies"] = official.count(None)
    if official != corrected:
        read = [(kind, rating) for kind, rating in zip(types, corrected) if rating is not None]
        scores["corrected"] = _figures([kind for kind, _ in read], [rating for _, rating in read])
    records = [
        {
            "id": question.id,
            "question_type": kind,
            "answer": answer,
            "rating": rating or 0,
            "hallucinated": (rating or 0) < 3,
            "readable": rating is not None,
            "judge_reply": reply,
        }
        for question, kind, answer, rating, reply in zip(questions, types, answers, official, replies)
    ]
    return Score({**scores, "judge": judge.describe("mmhal")}, records)


def _figures(types: Sequence[str], ratings: Sequence[int]) -> dict[str, Any]:
    by_type = defaultdict(list)
    for kind, rating in zip(types, ratings):
        by_type[kind].append(rating)
    return {
        "score": fmean(ratings),
        "hallucination_rate": fmean(rating < 3 for rating in ratings),
        "questions": len(ratings),
        "by_type": {kind: fmean(values) for kind, values in by_type.items()},
    }
