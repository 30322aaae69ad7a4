"""LLaVA-Bench (in the wild): 60 open questions; a judge rates our answer beside GPT-4's. Table 4 is its breakdown."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from povid.benchmarks import judge as judging
from povid.benchmarks import llava_format
from povid.benchmarks.answer_file import read_records
from povid.fault import Fault
from povid.model.question import Decoding, Question, Score

DECODING = Decoding(max_new_tokens=1024)
OFFICIAL = "haotian-liu/LLaVA llava/eval/eval_gpt_review_bench.py, summarize_gpt_review.py (gpt-4-0314)"
FILES = ("questions.jsonl", "context.jsonl", "answers_gpt4.jsonl", "images/")
CATEGORIES = ("conv", "detail", "complex")


def load(data: Path, images: Path | None = None) -> list[Question]:
    """Questions without a suffix, each with its context and GPT-4's reference answer.

    The official script pairs questions and references by line; here they are paired by question_id, and Fault is
    raised where the two files disagree.
    """
    data = Path(data)
    files = [llava_format.needed(data, [name], "llava_bench") for name in FILES[:3]]
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
                f"{place} asks question {name} ({category}) about {image}, for which context.jsonl, "
                "answers_gpt4.jsonl or the categories conv, detail and complex have nothing; "
                "fetch the files again."
            )
        questions.append(
            Question(
                name,
                llava_format.picture([images, data / "images"], [image]),
                text,
                {"category": category, "context": captions[image], "reference": references[str(name)]},
            )
        )
    return questions


def read_answers(file: Path, questions: Sequence[Question]) -> list[str]:
    """Answers from LLaVA's JSON Lines."""
    return llava_format.by_question_id(Path(file), questions)


def write_official(questions: Sequence[Question], answers: Sequence[str], folder: Path) -> Path:
    """LLaVA's JSON Lines, which eval_gpt_review_bench.py reads line by line in the order of questions.jsonl."""
    return llava_format.write_jsonl(
        Path(folder) / "llava_bench_answers.jsonl", llava_format.records(questions, answers)
    )


def score(questions: Sequence[Question], answers: Sequence[str], judge: judging.Judge) -> Score:
    """100 x mean score of ours / mean score of the reference, overall and for each category, one decimal.

    Officially a reply whose first line is not two numbers counts as -1 for both and stays in the means; "corrected"
    leaves it out. Raises Fault when no reply of some category can be read.
    """
    requests = [
        judging.llava_bench_request(
            f"llava_bench question {question.id}",
            question.meta["context"],
            question.text,
            question.meta["reference"],
            answer,
        )
        for question, answer in zip(questions, answers, strict=True)
    ]
    replies = [reply.text for reply in judge.ask("llava_bench", requests)]
    pairs = [judging.llava_bench_pair(reply) for reply in replies]
    for category in {question.meta["category"] for question in questions}:
        here = [pair for question, pair in zip(questions, pairs) if question.meta["category"] == category]
        if not any(here):
            raise judging.unreadable(f"llava_bench ({category})", judge, len(here))
    scores = _figures(questions, [pair or (-1.0, -1.0) for pair in pairs])
    scores["unreadable_replies"] = pairs.count(None)
    if None in pairs:
        scores["corrected"] = _figures(questions, pairs)
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
    return Score({**scores, "judge": judge.describe("llava_bench")}, records)


def _figures(questions: Sequence[Question], pairs: Sequence[tuple[float, float] | None]) -> dict[str, Any]:
    rows: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for question, pair in zip(questions, pairs):
        if pair is not None:
            rows["overall"].append(pair)
            rows[question.meta["category"]].append(pair)
    means = {name: [round(mean, 3) for mean in np.asarray(values).mean(0).tolist()] for name, values in rows.items()}
    ratios = {name: round(ours / theirs * 100, 1) if theirs else None for name, (theirs, ours) in means.items()}
    times_ten = {
        name: {"reference": round(theirs * 10, 1), "model": round(ours * 10, 1)}
        for name, (theirs, ours) in means.items()
    }
    return {**ratios, "means_x10": times_ten, "questions": len(questions)}
