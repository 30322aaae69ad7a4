"""MMHal-Bench: 96 questions of 8 types that provoke hallucination, rated 0 to 6 by a judge that sees no image."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, Literal

from povid.benchmarks import llava_format
from povid.benchmarks.answer_file import read_records
from povid.benchmarks.benchmark import Benchmark, Column, Source
from povid.benchmarks.judge import Judge, required, unreadable
from povid.benchmarks.wording import Script
from povid.files import write_text
from povid.model.question import Question, Score
from povid.server.endpoint import Request

HUB = "https://huggingface.co/datasets/Shengcao1006/MMHal-Bench/resolve/main"
TEMPLATES = ("response_template.json", "mmhal-bench_answer_template.json")


class MMHal(Benchmark):
    """``data`` holds response_template.json, and images/ or test_data/images/."""

    name: ClassVar[str] = "mmhal"
    official: ClassVar[str] = "llava-rlhf/LLaVA-RLHF Eval/eval_gpt_mmhal.py (gpt-4-0314, text only)"
    columns: ClassVar[tuple[Column, ...]] = (Column("mmhal.score", "MMHal", "high", 2),)
    decimals: ClassVar[int] = 2
    sources: ClassVar[tuple[Source, ...]] = (
        Source(f"{HUB}/response_template.json", "response_template.json"),
        Source(f"{HUB}/test_data.zip", "test_data.zip", unpack="."),
    )
    judged: ClassVar[Literal["never", "optional", "always"]] = "always"
    official_judge: ClassVar[str] = "gpt-4-0314"
    wording: ClassVar[str] = "povid-1"
    prompt_sources: ClassVar[tuple[Source, ...]] = (
        Source(
            "https://raw.githubusercontent.com/llava-rlhf/LLaVA-RLHF/830a083fd83e607da3c35f2e6aef833523c1e722/Eval/"
            "eval_gpt_mmhal.py",
            "judge/eval_gpt_mmhal.py",
            9601,
            "5ba718be65d03cb9e80321ad9eb08b37a0eb0040372e1fa20f78eaf525fe8f7c",
        ),
    )

    @classmethod
    def own_prompt(cls) -> dict[str, str]:
        """See :data:`PROMPT`."""
        return {"prompt": PROMPT}

    @classmethod
    def official_prompt(cls, scripts: Mapping[str, str]) -> dict[str, str]:
        """The template of eval_gpt_mmhal.py."""
        return {"prompt": Script("eval_gpt_mmhal.py", scripts["eval_gpt_mmhal.py"]).assigned("template")}

    def questions(self) -> list[Question]:
        """Questions of the official response template, without a suffix; pictures by the last part of their address."""
        questions = []
        for number, (place, record) in enumerate(read_records(llava_format.needed(self, TEMPLATES))):
            text, source, *_ = llava_format.fields(
                place, record, "question", "image_src", "image_id", "gt_answer", "image_content", "question_type"
            )
            folders = [self.images, self.data / "images", self.data / "test_data" / "images", self.data]
            picture = llava_format.picture(folders, [source.rsplit("/", 1)[-1]])
            questions.append(Question(number, picture, text, {"record": record}))
        return questions

    def read_answers(self, file: Path, questions: Sequence[Question]) -> list[str]:
        """Answers from the filled template (``model_answer``), or LLaVA's JSON Lines with the row as question_id."""
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

    def write_official(self, questions: Sequence[Question], answers: Sequence[str], folder: Path) -> Path:
        """The response template with ``model_answer`` filled in, which the official script judges."""
        filled = [
            {**question.meta["record"], "model_answer": answer}
            for question, answer in zip(questions, answers, strict=True)
        ]
        return write_text(Path(folder) / "mmhal_responses.json", json.dumps(filled, indent=2))

    def score(self, questions: Sequence[Question], answers: Sequence[str], judge: Judge | None = None) -> Score:
        """Mean rating (0 to 6), hallucination rate (share of ratings below 3) and the mean of each question type.

        Officially a reply with no rating or with several different ones counts as 0; "corrected" takes the last rating
        that a reply states and leaves out replies without one. Raises Fault when no reply at all can be read.
        """
        judge = required(self, judge)
        words, requests = judge.words(self).parts, []
        for question, answer in zip(questions, answers, strict=True):
            record = question.meta["record"]
            contents = record["image_content"]
            contents = contents["class"] if isinstance(contents, dict) else contents  # as a data set loader gives them
            requests.append(
                request(words, f"mmhal question {question.id}", contents, question.text, record["gt_answer"], answer)
            )
        replies = [reply.text for reply in judge.ask(self, requests)]
        official = [parse(reply) for reply in replies]
        corrected = [parse_corrected(reply) for reply in replies]
        if not any(rating is not None for rating in official + corrected):
            raise unreadable(self, judge, len(replies))
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
        return Score({**scores, **judge.describe(self)}, records)


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


PROMPT = """\
You are a fair judge of answers that a vision-language model gave about an image. Judge two things: how informative \
the answer is, and whether it hallucinates. To hallucinate is to state something (an object, an action, a number, a \
place, a feeling, any detail) that is neither in the image nor follows from it or from the question. You do not see \
the image; you get a list of what it contains and an answer that a person wrote.

Five worked examples:

### Example 1
- Image contents: Boat, Person, Person, Person
- Question: How many people are in the boat?
- Human answer: Three people sit in the boat.
- Model answer: There are two people in the boat.
- Analysis: The model counts two people where there are three, so what it says is false.
- Hallucination: Yes.

### Example 2
- Image contents: Bird, Fence, Plant
- Question: What does this picture show?
- Human answer: A small owl sits on a fence. Behind it there are bushes, out of focus.
- Model answer: The picture shows a small brown owl that rests on a fence, a fine view of a shy animal near its habitat.
- Analysis: Nothing in it contradicts the contents or the human answer. It does not claim, for instance, that the owl \
is hunting.
- Hallucination: No.

### Example 3
- Image contents: Bicycle, Bench, Tree, Building
- Question: Describe the photo in detail.
- Human answer: A red bicycle leans against a bench in a park. There are trees on both sides and a brick building \
far behind.
- Model answer: A red bicycle is parked at a wooden bench under trees. A man with a hat sits on the bench and reads, \
and a building stands in the background. The scene is calm and invites to rest.
- Analysis: The model adds a man who reads on the bench, and nobody is in the picture.
- Hallucination: Yes.

### Example 4
- Image contents: Sign, Train, Platform, Person
- Question: In which city was this photo taken?
- Human answer: The sign on the platform reads "Porto", so this is a station in Porto.
- Model answer: The photo was taken on the platform of a railway station, but the city cannot be told for certain.
- Analysis: The model does not name the city and so answers only in part, but it claims nothing false. Not knowing, \
or leaving out what the human answer has, is no hallucination.
- Hallucination: No.

### Example 5
- Image contents: River, Waste, Bottle
- Question: Which environmental problem can be seen here?
- Human answer: Plastic bottles float in a river. They harm the animals that live in it.
- Model answer: Plastic waste has gathered in the river. It breaks down slowly into small particles that fish and \
birds swallow, it can block the flow and cause floods, and its additives reach the water. Deposits on bottles, better \
collection and less packaging would help.
- Analysis: The answer is much longer than the human one, but what it adds is general knowledge that follows from the \
picture, and nothing of it is false. Such reasoning is welcome.
- Hallucination: No.

Judge the answer below in the same way, against the image contents, the question and the human answer.

Note that the human answer gives facts without much analysis and may leave out objects or details, so be careful \
before you call something hallucinated, and value reasoning by the model.

First explain your judgement in a few sentences. Then rate the answer with exactly one of these lines:
- Rating: 6, very informative with good analysis or reasoning, no hallucination
- Rating: 5, very informative, no hallucination
- Rating: 4, somewhat informative, no hallucination
- Rating: 3, not informative, no hallucination
- Rating: 2, very informative, with hallucination
- Rating: 1, somewhat informative, with hallucination
- Rating: 0, not informative, with hallucination

### Image contents
{}

### Question
{}

### Human answer
{}

### Model answer
{}
"""


def request(
    words: Mapping[str, str], name: str, contents: Sequence[str], question: str, reference: str, answer: str
) -> Request:
    """LLaVA-RLHF Eval/eval_gpt_mmhal.py: one user message without an image, temperature 0.

    ``words`` holds the "prompt", whose four fields are the contents, the question and both answers.
    """
    text = words["prompt"].format(", ".join(contents), question, reference, answer)
    return Request(
        [{"role": "user", "content": text}], 0.0, 1024, name=name, reads=lambda reply: parse_corrected(reply.text)
    )


def parse(reply: str) -> int | None:
    """The one s in 0..6 whose "rating: s" occurs in the lower-cased reply; None (officially 0) for none or several."""
    found = [score for score in range(7) if f"rating: {score}" in reply.lower()]
    return found[0] if len(found) == 1 else None


def parse_corrected(reply: str) -> int | None:
    """The last rating that the reply states, markdown allowed, as a person would read it; None without one."""
    found = re.findall(r"rating\W{1,6}([0-6])(?!\d|\.\d)", reply.lower())
    return int(found[-1]) if found else None
