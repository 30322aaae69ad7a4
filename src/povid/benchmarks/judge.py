"""Judges of four benchmarks: their prompts, how a reply is read, and how often a judge is asked.

The structure of every prompt is the official script's (named at each), the wording is our own where wording is not a
fact; so scores carry the judge's model name and the wording's version.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from povid.fault import Fault
from povid.server.endpoint import Endpoint, EndpointSettings, NoReply, Reply, Request, Spent

WORDING = "povid-1"
OFFICIAL_JUDGES = {
    "mmhal": "gpt-4-0314",
    "mm_vet": "gpt-4-0613",
    "llava_bench": "gpt-4-0314",
    "mmbench": "gpt-3.5-turbo-0613",
}


class Judge:
    """Who judges: a model behind an OpenAI-compatible server, asked through a file of kept replies.

    Args:
        cache: file of replies, shared by all runs so that nothing is paid for twice.
        model: the judge; None takes the official one of each benchmark (OFFICIAL_JUDGES).
        all others: as ``Endpoint`` takes them; nothing is opened or asked before the first judgement.
    """

    def __init__(
        self,
        cache: str | Path,
        *,
        model: str | None = None,
        base_url: str | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        concurrency: int = 8,
        timeout: float = 120.0,
        retries: int = 6,
        backoff: float = 1.0,
        requests_per_minute: float | None = None,
        input_price: float | None = None,
        output_price: float | None = None,
        budget: float | None = None,
        token_budget: int | None = None,
        max_tokens_key: str = "max_tokens",
    ) -> None:
        self._cache, self._model = cache, model
        self._settings: dict[str, Any] = {
            "base_url": base_url,
            "api_key_env": api_key_env,
            "concurrency": concurrency,
            "timeout": timeout,
            "retries": retries,
            "backoff": backoff,
            "requests_per_minute": requests_per_minute,
            "input_price": input_price,
            "output_price": output_price,
            "budget": budget,
            "token_budget": token_budget,
            "max_tokens_key": max_tokens_key,
        }
        self._endpoints: dict[str, Endpoint] = {}
        self._used: dict[str, Spent] = defaultdict(Spent)

    def model(self, benchmark: str) -> str:
        """Name of the model that judges ``benchmark``."""
        return self._model or OFFICIAL_JUDGES[benchmark]

    def endpoint(self, benchmark: str) -> Endpoint:
        """Where ``benchmark`` is judged; Fault where no key is set, or where the benchmark needs no judge."""
        if benchmark not in OFFICIAL_JUDGES:
            raise Fault(f"{benchmark} is scored without a judge; judged are {', '.join(OFFICIAL_JUDGES)}.")
        model = self.model(benchmark)
        if model not in self._endpoints:
            self._endpoints[model] = Endpoint(EndpointSettings(model=model, **self._settings), self._cache)
        return self._endpoints[model]

    def ask(self, benchmark: str, requests: Sequence[Request]) -> list[Reply]:
        """Replies in the order of the requests. Raises NoReply naming the first open one, when all others are kept."""
        replies: list[Reply | NoReply | None] = [None] * len(requests)
        endpoint = self.endpoint(benchmark)
        with tqdm(
            total=len(requests), desc=f"{benchmark} judged by {endpoint.model}", unit="reply", disable=None
        ) as bar:
            for position, reply in endpoint.ask_all(requests):
                replies[position] = reply
                if isinstance(reply, Reply):
                    self._used[benchmark].add(reply)
                bar.update()
        open_ones = [reply for reply in replies if isinstance(reply, NoReply)]
        if open_ones:
            raise NoReply(
                f"{len(open_ones)} of {len(requests)} judgements of {benchmark} are open, the first: {open_ones[0]}"
            ) from open_ones[0]
        return [reply for reply in replies if isinstance(reply, Reply)]

    def describe(self, benchmark: str) -> dict[str, Any]:
        """What stands beside a score: judge's model, wording of the prompts, what the replies behind it have cost.

        Counted are all replies since the last call, those from disk at what they cost when they were asked.
        """
        used = self._used.pop(benchmark, Spent())
        return {
            "model": self.model(benchmark),
            "official_model": OFFICIAL_JUDGES[benchmark],
            "wording": WORDING,
            "replies": used.requests,
            "tokens": used.tokens,
            "cost": used.cost,
        }


def unreadable(benchmark: str, judge: Judge, count: int) -> Fault:
    """The judge never kept to the form: there is no score to give."""
    return Fault(
        f"{benchmark}: none of {count} replies of the judge {judge.model(benchmark.split()[0])} holds a score "
        "that can be read; choose another judge with judge.model=..."
    )


# ---------------------------------------------------------------------- MMHal-Bench

MMHAL_PROMPT = """\
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
{contents}

### Question
{question}

### Human answer
{reference}

### Model answer
{answer}
"""


def mmhal_request(name: str, contents: Sequence[str], question: str, reference: str, answer: str) -> Request:
    """LLaVA-RLHF Eval/eval_gpt_mmhal.py: one user message without an image, temperature 0."""
    text = MMHAL_PROMPT.format(contents=", ".join(contents), question=question, reference=reference, answer=answer)
    return Request([{"role": "user", "content": text}], temperature=0.0, max_tokens=1024, name=name)


def mmhal_rating(reply: str) -> int | None:
    """The one s in 0..6 whose "rating: s" occurs in the lower-cased reply; None (officially 0) for none or several."""
    found = [score for score in range(7) if f"rating: {score}" in reply.lower()]
    return found[0] if len(found) == 1 else None


def mmhal_last_rating(reply: str) -> int | None:
    """The last rating that the reply states, markdown allowed, as a person would read it; None without one."""
    found = re.findall(r"rating\W{1,6}([0-6])(?!\d|\.\d)", reply.lower())
    return int(found[-1]) if found else None


# ---------------------------------------------------------------------- MM-Vet

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
MM_VET_PROMPT = "\n".join(
    [
        "Compare the prediction of a model with the ground truth and grade how correct it is. <AND> in the ground truth "
        "means that the prediction is entirely right only if it has all of the elements; <OR> means that any one of them "
        "is enough. The grade is 0.0 (entirely wrong), 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9 or 1.0 (entirely "
        "right). Fill in only the last cell, the grade.",
        "",
        "Question | Ground truth | Prediction | Correctness",
        "--- | --- | --- | ---",
        *(" | ".join(row) for row in _ROWS),
        "",
    ]
)
MM_VET_INSIST = "\nGive the correctness of the prediction as a number (digit): "
MM_VET_TEMPERATURES = (0.0, 0.0, 0.5, 1.0, 1.5)  # of the first question and of those that insist; then the grade is 0


def mm_vet_request(name: str, question: str, truth: str, prediction: str, attempt: int, run: int) -> Request:
    """MM-Vet mm-vet_evaluator.py: a table whose last cell is open, max_tokens 3; attempts after the first insist."""
    truth = truth.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    text = MM_VET_PROMPT + "\n" + " | ".join([question, truth, prediction, ""]) + (MM_VET_INSIST if attempt else "")
    return Request(
        [{"role": "user", "content": text}],
        temperature=MM_VET_TEMPERATURES[attempt],
        max_tokens=3,
        sample=run,
        name=name,
    )


def mm_vet_grade(reply: str) -> float | None:
    """What stands before the first space, as a number in [0, 1]; None if it is none (also for a leading space)."""
    try:
        grade = float(reply.split(" ")[0].strip())
    except ValueError:
        return None
    return grade if 0.0 <= grade <= 1.0 else None


def mm_vet_grades(judge: Judge, items: Sequence[tuple[str, str, str, str]], run: int = 0) -> list[float | None]:
    """Grades of (name, question, ground truth, prediction); five unreadable replies give None (officially 0)."""
    grades: list[float | None] = [None] * len(items)
    for attempt in range(len(MM_VET_TEMPERATURES)):
        open_ones = [number for number, grade in enumerate(grades) if grade is None]
        requests = [mm_vet_request(*items[number], attempt=attempt, run=run) for number in open_ones]
        for number, reply in zip(open_ones, judge.ask("mm_vet", requests) if requests else []):
            grades[number] = mm_vet_grade(reply.text)
    return grades


# ---------------------------------------------------------------------- LLaVA-Bench

LLAVA_BENCH_SYSTEM = "You are a precise and helpful assistant who checks the quality of answers."
LLAVA_BENCH_RULE = (  # one text for conv, detail and complex, as in the official rule file
    "Please judge the answers that two AI assistants gave to the user's question shown above. The user asks about an "
    "image, which is given to you as a few sentences that describe it.\n"
    "Rate how helpful, relevant, accurate and detailed each answer is. Each assistant gets an overall score from 1 to "
    "10; a higher score means a better answer.\n"
    "Write a first line that holds only two numbers, the scores of Assistant 1 and Assistant 2 in this order, "
    "separated by a space.\n"
    "From the next line on explain your judgement in full, without bias and without letting the order of the answers "
    "influence it."
)


def llava_bench_request(name: str, context: str, question: str, reference: str, answer: str) -> Request:
    """LLaVA llava/eval/eval_gpt_review_bench.py: five blocks, the reference first, temperature 0.2, max_tokens 1024."""
    text = (
        f"[Context]\n{context}\n\n[Question]\n{question}\n\n"
        f"[Assistant 1]\n{reference}\n\n[End of Assistant 1]\n\n"
        f"[Assistant 2]\n{answer}\n\n[End of Assistant 2]\n\n[System]\n{LLAVA_BENCH_RULE}\n\n"
    )
    messages = [{"role": "system", "content": LLAVA_BENCH_SYSTEM}, {"role": "user", "content": text}]
    return Request(messages, temperature=0.2, max_tokens=1024, name=name)


def llava_bench_pair(reply: str) -> tuple[float, float] | None:
    """(reference's score, model's score) of the first line; None (officially -1, -1) unless it is two numbers.

    Commas become spaces and the line is split at single spaces, so "8,9" is read and "8, 9" is not.
    """
    parts = reply.split("\n")[0].replace(",", " ").split(" ")
    try:
        pair = (float(parts[0]), float(parts[1])) if len(parts) == 2 else None
    except ValueError:
        return None
    return pair if pair and all(map(math.isfinite, pair)) else None


# ---------------------------------------------------------------------- MMBench

MMBENCH_PROMPT = """\
You match an answer with the options of a multiple-choice question. You get a question, several options and an answer, \
and say which option means most nearly the same as the answer. If no option means the same as the answer, say E. Reply \
with a single upper-case letter: A, B, C or D (if there is such an option), or E.
Example 1:
Question: Which animal is in the picture?
Options: A. horse B. goat C. sheep D. cow
Answer: a young goat
Your output: B
Example 2:
Question: Which animal is in the picture?
Options: A. horse B. goat C. sheep D. cow
Answer: A bicycle
Your output: E
Example 3:
Question: {question}?
Options: There are several options:
{options}
Answer: {answer}
Your output: """


def mmbench_request(name: str, question: str, options: Mapping[str, str], answer: str, attempt: int) -> Request:
    """lmms-eval mmbench_evals.py build_prompt: temperature 0, max_tokens 256; a further attempt is a new sample."""
    listed = "\n".join(f"{letter}. {text}" for letter, text in options.items())
    text = MMBENCH_PROMPT.format(question=question, options=listed, answer=answer)
    return Request([{"role": "user", "content": text}], temperature=0.0, max_tokens=256, sample=attempt, name=name)
