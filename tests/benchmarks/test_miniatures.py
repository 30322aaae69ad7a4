"""The six other benchmarks end to end on miniatures of their official files: a tiny model is killed and resumed."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import tiny
from PIL import Image
from servers import ChatServer, Say, last_text

from povid.benchmarks import __main__ as command
from povid.benchmarks import suite
from povid.benchmarks.benchmark import Benchmark
from povid.benchmarks.judge import Judge
from povid.model.generation import Answers
from povid.model.question import Decoding, Question

NAMES = ("mmhal", "science_qa", "mme", "mmbench", "mm_vet", "llava_bench")


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (12, 9), (shade, 90, 200 - shade)).save(buffer, "PNG")
    return buffer.getvalue()


def put(file: Path, content: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif isinstance(content, list) and file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in content))
    else:
        file.write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.fixture
def selection(tmp_path) -> dict[str, Benchmark]:
    data = tmp_path / "data"
    put(
        data / "mmhal/response_template.json",
        [
            {
                "question_type": kind,
                "question_topic": "t",
                "image_id": f"i{n}",
                "image_src": f"http://x/{n}.jpg",
                "image_content": ["Dog"],
                "question": "What is it",
                "gt_answer": "A dog.",
                "model_answer": "",
            }
            for n, kind in enumerate(["attribute", "other", "counting"])
        ],
    )
    put(
        data / "science_qa/problems.json",
        {
            str(n): {
                "question": "What is it",
                "choices": ["dog", "cat"],
                "answer": n % 2,
                "hint": "",
                "image": "image.png",
                "subject": "s",
            }
            for n in range(3)
        }
        | {"9": {"question": "Is there a cat", "choices": ["Yes", "No"], "answer": 0, "hint": "", "image": None}},
    )
    put(data / "science_qa/pid_splits.json", {"test": ["0", "1", "9", "2"]})
    for n in range(3):
        put(data / f"mmhal/images/{n}.jpg", png(n))
        put(data / f"science_qa/images/test/{n}/image.png", png(n))
        put(data / f"mm_vet/images/v1_{n}.png", png(n))
        put(data / f"llava_bench/images/00{n}.jpg", png(n))
        put(data / f"mme/MME_Benchmark_release_version/count/{n}.png", png(n))
        put(
            data / f"mme/MME_Benchmark_release_version/count/{n}.txt",
            "Is there a dog? Please answer yes or no.\tYes\nIs there a cat? Please answer yes or no.\tNo\n",
        )
    rows = [
        f"{copy + n}\tWhat is it\tdog\tcat\t{right}\tc\t{base64.b64encode(png(n)).decode()}"
        for n in range(2)
        for copy, right in ((0, "A"), (1_000_000, "B"))
    ]
    put(data / "mmbench/mmbench_dev_20230712.tsv", "\n".join(["index\tquestion\tA\tB\tanswer\tcategory\timage", *rows]))
    put(
        data / "mm_vet/mm-vet.json",
        {
            f"v1_{n}": {"imagename": f"v1_{n}.png", "question": "What is it", "answer": "dog", "capability": ["rec"]}
            for n in range(3)
        },
    )
    kinds = ["conv", "detail", "complex"]
    put(
        data / "llava_bench/questions.jsonl",
        [
            {"question_id": n, "image": f"00{n}.jpg", "text": "What is it", "category": kind}
            for n, kind in enumerate(kinds)
        ],
    )
    put(data / "llava_bench/context.jsonl", [{"image": f"00{n}.jpg", "caption": "A dog."} for n in range(3)])
    put(data / "llava_bench/answers_gpt4.jsonl", [{"question_id": n, "text": "A dog."} for n in range(3)])
    built = {name: command.find(name)(data=data / name, max_new_tokens=6) for name in NAMES}
    return built | {"science_qa": built["science_qa"].changed(image_questions_only=True)}


def judge_says(body: dict, number: int) -> Say:
    text = last_text(body)
    if "Rating: 6" in text:
        return Say("Well.\nRating: 4, somewhat informative")
    if body["max_tokens"] == 3:
        return Say("0.7")
    return Say("8 6\nFine" if "[Assistant 1]" in text else "Your output: A")


class Killed(Exception):
    pass


class Counting:
    """An answerer that counts, and dies after some answers."""

    def __init__(self, answers: Answers, lives: int | None = None) -> None:
        self.answers, self.lives, self.asked = answers, lives, 0

    def __call__(self, questions: Sequence[Question], decoding: Decoding) -> Iterator[tuple[int, str]]:
        for answer in self.answers(questions, decoding):
            if self.asked == self.lives:
                raise Killed
            self.asked += 1
            yield answer


def test_six_benchmarks_killed_in_the_middle_and_resumed_then_scored_by_the_command(selection, tmp_path, capsys):
    """3 + 3 + 6 + 4 + 3 + 3 = 22 questions; MMHal 4.0, MM-Vet 70.0, LLaVA-Bench 6/8 = 75.0 by the judge's replies."""
    policy, template = tiny.load(tiny.save_tiny_llava(tmp_path / "model"), max_length=512)
    answers = Answers(policy, template, batch_size=2)
    with ChatServer(judge_says) as server:
        judge = Judge(cache=tmp_path / "replies.jsonl", base_url=server.url)
        whole = suite.run(selection, Counting(answers), tmp_path / "whole", judge)
        done = 0
        for lives in (2, 7, 5):
            killed = Counting(answers, lives)
            with pytest.raises(Killed):
                suite.run(selection, killed, tmp_path / "out", judge)
            done += killed.asked
        last = Counting(answers)
        results = suite.run(selection, last, tmp_path / "out", judge)
        assert done + last.asked == 22 and done == 14
        assert not [name for name in NAMES if "missing" in results[name]], results
        for name in NAMES:
            assert whole[name] == results[name]
        assert (results["mmhal"]["score"], results["mm_vet"]["total"], results["llava_bench"]["overall"]) == (4, 70, 75)
        sent = len(server.requests)
        for name in NAMES:
            official = next(path for path in sorted((tmp_path / "out" / name / "official").iterdir()))
            for file in (official, tmp_path / "out" / name / "answers.jsonl"):
                out = tmp_path / "again.json"
                line = [
                    name,
                    "--answers",
                    str(file),
                    "--data",
                    str(selection[name].data),
                    "--json",
                    str(out),
                    "--judge-model",
                    "official",
                    "--judge-url",
                    server.url,
                    "--judge-cache",
                    str(tmp_path / "replies.jsonl"),
                ]
                assert command.main(line) == 0, capsys.readouterr().err
                again = json.loads(out.read_text())["scores"]
                same = {
                    "mmhal": "score",
                    "science_qa": "img_accuracy",
                    "mme": "subtasks",
                    "mmbench": "accuracy",
                    "mm_vet": "total",
                    "llava_bench": "overall",
                }[name]
                assert again[same] == results[name][same]
        assert len(server.requests) == sent


def test_without_a_judge_the_answers_are_kept_and_the_reason_is_given(selection, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)

    def answers(questions, decoding):
        yield from ((index, "A") for index in range(len(questions)))

    for judge, says in ((None, "judge"), (Judge(cache=tmp_path / "r.jsonl"), "OPENAI_API_KEY is not set")):
        results = suite.run(selection, answers, tmp_path / "out", judge)
        for name in ("mmhal", "mm_vet", "llava_bench"):
            assert says in results[name]["missing"] and "python -m povid.benchmarks" in results[name]["cure"]
            assert (tmp_path / "out" / name / "answers.jsonl").stat().st_size
        assert results["science_qa"]["img_accuracy"] == pytest.approx(200 / 3)
