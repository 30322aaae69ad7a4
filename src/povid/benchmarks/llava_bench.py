"""LLaVA-Bench (in the wild): 60 open questions; a judge rates our answer beside GPT-4's. Table 4 is its breakdown."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from povid.benchmarks import llava_format
from povid.benchmarks.answer_file import read_records
from povid.benchmarks.benchmark import Benchmark, Column, Source
from povid.benchmarks.calibrate import Calibrated, Published, Rating, Ratings, by_question, graded_file, nanmean, source
from povid.benchmarks.judge import Judge, required, unreadable
from povid.benchmarks.wording import Script
from povid.fault import Fault
from povid.model.question import Question, Score
from povid.server.endpoint import Request

HUB = "https://huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild/resolve/main"
LLAVA = "https://raw.githubusercontent.com/haotian-liu/LLaVA/c121f0432da27facab705978f83c4ada465e46fd/llava/eval"
FILES = ("questions.jsonl", "context.jsonl", "answers_gpt4.jsonl")
WHAT = "replies without two finite numbers in their first line are left out; officially they count as -1 for both"
BY_ID = "each answer to the question that its id names, where the official script counts by line"
CATEGORIES = ("conv", "detail", "complex")


class LLaVABench(Benchmark, Calibrated):
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
    prompt_sources: ClassVar[tuple[Source, ...]] = (
        Source(
            f"{LLAVA}/eval_gpt_review_bench.py",
            "judge/eval_gpt_review_bench.py",
            4172,
            "fd6a2c3ed99b0b2881e056160c03aab17f7ea5879b9e03fd993381b4d47e63f2",
        ),
        Source(
            f"{LLAVA}/table/rule.json",
            "judge/rule.json",
            9098,
            "dd7345a44ce9f7a24e51a30ee030cdab32346f9d08e3359c80545ff1312b1e07",
        ),
    )

    graded: ClassVar[tuple[Source, ...]] = (
        source(
            "llava-bench-in-the-wild/answers/llava-v1.5-7b.jsonl",
            45208,
            "4345233f37195aecb6dd6213d03978311eb0566f39e32a3d48fb00a1c463f964",
        ),
        source(
            "llava-bench-in-the-wild/answers/llava-v1.5-13b.jsonl",
            48203,
            "73cfd344474839171ef360a7290e3f85cc1bfe633e450e4a2deb7d44b6bd6473",
        ),
        source(
            "llava-bench-in-the-wild/reviews/llava-v1.5-7b-eval1.jsonl",
            41935,
            "4914337cce57c8a7e9c40954f896fcc63e32bbebed455d222e212bf43d97f583",
        ),
        source(
            "llava-bench-in-the-wild/reviews/llava-v1.5-7b-eval2.jsonl",
            41150,
            "5829d7f891a39e15282963d0fd84c29c73197f01218008a8ebcbbefb50163cde",
        ),
        source(
            "llava-bench-in-the-wild/reviews/llava-v1.5-7b-eval3.jsonl",
            41942,
            "541644fd9bb794561a65455859cd7e703ffcc07cbd5841d51351140a9a0d07db",
        ),
        source(
            "llava-bench-in-the-wild/reviews/llava-v1.5-13b-eval1.jsonl",
            42083,
            "af2181db95fda61d929bb300e9c3934f98bd325d032c203f38f2b7e7445f16e4",
        ),
        source(
            "llava-bench-in-the-wild/reviews/llava-v1.5-13b-eval2.jsonl",
            42629,
            "6751e48c32e7a0fc1b0f397872f3b1f1711f3c54dab35f633e52a0a88cfbdf39",
        ),
        source(
            "llava-bench-in-the-wild/reviews/llava-v1.5-13b-eval3.jsonl",
            42231,
            "b70ee0b8c29811bed2a5cf9d94e14b79b95f5823caabfb097d3dafb1d2f9371d",
        ),
    )

    @classmethod
    def own_prompt(cls) -> dict[str, str]:
        """The system message, the frame of five blocks, and a rule for each category."""
        return {"system": SYSTEM, "frame": FRAME} | dict.fromkeys(CATEGORIES, RULE)

    @classmethod
    def official_prompt(cls, scripts: Mapping[str, str]) -> dict[str, str]:
        """System message and frame of eval_gpt_review_bench.py, rules of rule.json."""
        script = Script("eval_gpt_review_bench.py", scripts["eval_gpt_review_bench.py"])
        try:
            rules = [json.loads(scripts["rule.json"])[f"llava_bench_{category}"] for category in CATEGORIES]
            (role,) = {rule["role"] for rule in rules}
            prompts = dict(zip(CATEGORIES, (rule["prompt"] for rule in rules)))
        except (ValueError, KeyError, TypeError) as error:
            raise Fault(f"rule.json has no rules of one role for conv, detail and complex ({error!r})") from None
        blanks = {
            "cap_str": "{context}",
            "ques['text']": "{question}",
            "ans1['text']": "{reference}",
            "ans2['text']": "{answer}",
            "prompt": "{rule}",
            "role": role,
        }
        return {"system": script.said_by("system"), "frame": script.template("content", blanks)} | prompts

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
            score.scores["by_id"] = {name: value for name, value in own.items() if name not in ("judge", "judging")} | {
                "what": BY_ID
            }
        return score

    def published(self, questions: Sequence[Question]) -> list[Published]:
        """LLaVA-1.5 7B and 13B, three official reviews of each."""
        sets = []
        for model in ("llava-v1.5-7b", "llava-v1.5-13b"):
            file = graded_file(self, f"{model}.jsonl")
            answers = by_question(self, questions, file, llava_format.texts(file))
            gradings = []
            for number in (1, 2, 3):
                file = graded_file(self, f"{model}-eval{number}.jsonl")
                reviews = by_question(self, questions, file, llava_format.texts(file, text="content"))
                gradings.append([_rating(parse(review)) for review in reviews])
            sets.append(Published(model, answers, gradings))
        return sets

    def rating(self, record: Mapping[str, Any]) -> Rating:
        """The scores of our answer and of the reference, 1 to 10."""
        return _rating(record["scores"])

    def figure(self, ratings: Ratings) -> np.ndarray:
        """100 x mean score of the model / mean score of the reference, both with the official three decimals."""
        return 100 * nanmean(ratings["model"], axis=-1).round(3) / nanmean(ratings["reference"], axis=-1).round(3)

    def kinds(self, question: Question) -> list[str]:
        """Its category."""
        return [question.meta["category"]]

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
        words = judge.words(self).parts
        requests = [
            request(
                words,
                f"llava_bench question {question.id}",
                question.meta["category"],
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
        return Score({**scores, **judge.describe(self)}, records)


def _rating(pair: Sequence[float] | None) -> Rating:
    return {"model": pair[1], "reference": pair[0]} if pair else {}


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
FRAME = (
    "[Context]\n{context}\n\n[Question]\n{question}\n\n"
    "[Assistant 1]\n{reference}\n\n[End of Assistant 1]\n\n"
    "[Assistant 2]\n{answer}\n\n[End of Assistant 2]\n\n[System]\n{rule}\n\n"
)
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


def request(
    words: Mapping[str, str], name: str, category: str, context: str, question: str, reference: str, answer: str
) -> Request:
    """LLaVA llava/eval/eval_gpt_review_bench.py: five blocks, the reference first, temperature 0.2, max_tokens 1024."""
    text = words["frame"].format(
        context=context, question=question, reference=reference, answer=answer, rule=words[category]
    )
    messages = [{"role": "system", "content": words["system"]}, {"role": "user", "content": text}]
    return Request(messages, temperature=0.2, max_tokens=1024, name=name, reads=lambda reply: parse(reply.text))


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
