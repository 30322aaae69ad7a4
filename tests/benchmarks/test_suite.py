"""The suite: what is missing is reported before anything is answered; no answer is lost or asked for again."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pydantic import Field

from povid.benchmarks import suite
from povid.benchmarks.benchmark import Benchmark, Column
from povid.benchmarks.chair import CHAIR
from povid.benchmarks.pope import POPE
from povid.fault import Fault, validated
from povid.files import write_text
from povid.model.question import Decoding, Question, Score

TRUTH = {"a_1": ["cat"], "a_2": ["dog", "cup"], "a_3": ["cup"]}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three pictures with objects and a POPE split about them, in the files of a real evaluation."""
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    (folder / "synonyms.txt").write_text("cat, kitten\ndog, puppy\ncup\n")
    (folder / "objects.json").write_text(json.dumps(TRUTH))
    rows = []
    for number, (name, there) in enumerate(TRUTH.items()):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / "images" / f"{name}.png")
        for word in ("cat", "dog"):
            rows.append(
                {
                    "question_id": len(rows) + 1,
                    "image": f"{name}.png",
                    "text": f"Is there a {word} in the image?",
                    "label": "yes" if word in there else "no",
                }
            )
    (folder / "coco_pope_random.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


class Answers:
    """Answers that can be told apart, the last question first; counts what it was asked."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.asked: list[str | int] = []
        self.decodings: list[Decoding] = []
        self.stop_after = stop_after

    def __call__(self, questions: Sequence[Question], decoding: Decoding) -> Iterator[tuple[int, str]]:
        self.decodings.append(decoding)
        for index in reversed(range(len(questions))):
            if self.stop_after is not None and len(self.asked) >= self.stop_after:
                return
            self.asked.append(questions[index].id)
            text = "yes" if questions[index].text.startswith("Is") else "A kitten\u2028and a \ud800 dog."
            yield index, text


def selection(data: Path) -> dict[str, Benchmark]:
    return {"chair": CHAIR(data=str(data)), "pope": POPE(data=str(data), suffix="")}


def test_scores_by_hand_and_files(data: Path, tmp_path: Path) -> None:
    """Every caption names cat, dog: hallucinated are dog (1), cat (2), both (3), so CHAIR_S 100, CHAIR_I 4/6.

    Yes to all six questions, of which two are right: accuracy 1/3, recall 1, precision 1/3, F1 1/2.
    """
    answers = Answers()
    results = suite.run(selection(data), answers, tmp_path / "out")
    assert results["chair"]["CHAIR_S"] == 100.0
    assert results["chair"]["CHAIR_I"] == pytest.approx(400 / 6)
    assert results["pope"]["f1"] == pytest.approx(50.0)
    assert results["pope"]["decoding"] == {"max_new_tokens": 128, "temperature": 0.0, "stop": "."}
    assert len(answers.asked) == 9
    kept = json.loads((tmp_path / "out" / "chair" / "scores.json").read_text())
    assert kept["scores"] == results["chair"] and len(kept["records"]) == 3
    rows = [json.loads(line) for line in (tmp_path / "out" / "pope" / "answers.jsonl").read_text().splitlines()]
    assert rows[-1] == {
        "question_id": "random/6",
        "prompt": "Is there a dog in the image?",
        "text": "yes",
        "answer_id": rows[-1]["answer_id"],
        "model_id": "povid",
        "metadata": {},
    }
    questions = POPE(data=data, suffix="").questions()
    official = tmp_path / "out" / "pope" / "official" / "coco_pope_random_answers.json"
    assert POPE(data=data).read_answers(official, questions) == ["yes"] * 6


def test_a_second_run_asks_nothing_again(data: Path, tmp_path: Path) -> None:
    first = suite.run(selection(data), Answers(), tmp_path / "out")
    again = Answers()
    assert suite.run(selection(data), again, tmp_path / "out") == first and again.asked == []


def test_an_interrupted_run_resumes_where_it_stopped(data: Path, tmp_path: Path) -> None:
    half = suite.run(selection(data), Answers(stop_after=5), tmp_path / "out")
    assert "CHAIR_S" in half["chair"]
    assert half["pope"]["missing"] == "pope: 2 of 6 questions are answered; run again to resume"
    rest = Answers()
    whole = suite.run(selection(data), rest, tmp_path / "out")
    assert len(rest.asked) == 4
    assert whole == suite.run(selection(data), Answers(), tmp_path / "other")


def test_decoding_can_be_set(data: Path, tmp_path: Path) -> None:
    answers = Answers()
    suite.run({"chair": CHAIR(data=data, temperature=0.2, max_new_tokens=7)}, answers, tmp_path / "out")
    assert answers.decodings == [Decoding(max_new_tokens=7, temperature=0.2)]


def test_answers_to_something_else_are_refused(data: Path, tmp_path: Path) -> None:
    suite.run({"chair": CHAIR(data=data)}, Answers(), tmp_path / "out")
    for settings, model, sentence in (
        ({"prompt": "What is this?"}, "povid", "holds answers to different questions"),
        ({"ids": ["a_1"]}, "povid", "holds answers to a different number of questions (3 there, 1 now)"),
        ({"max_new_tokens": 3}, "povid", "holds answers with different decoding settings"),
        ({}, "other", "holds answers by a different model (povid there, other now)"),
    ):
        again = Answers()
        result = suite.run({"chair": CHAIR(data=data, **settings)}, again, tmp_path / "out", model=model)["chair"]
        assert sentence in result["missing"] and "choose another output folder" in result["missing"]
        assert again.asked == []


def test_pictures_and_truth_that_changed_since_the_answers_are_noticed(data: Path, tmp_path: Path) -> None:
    """The names stay and the questions stay: only what the pictures show, or what the answers are compared with."""
    suite.run(selection(data), Answers(), tmp_path / "out")
    truth, picture = data / "objects.json", data / "images" / "a_2.png"
    honest = truth.read_bytes(), picture.read_bytes()
    for sentence, change, of in (
        (
            "holds answers to questions with other reference answers",
            lambda: truth.write_text(json.dumps(TRUTH | {"a_1": ["dog"]})),
            ("chair",),
        ),
        (
            "holds answers about different pictures",
            lambda: Image.new("RGB", (8, 8), "white").save(picture),
            ("chair", "pope"),
        ),
    ):
        change()
        again = Answers()
        results = suite.run(selection(data), again, tmp_path / "out")
        for name in of:
            assert sentence in results[name]["missing"], name
        assert again.asked == []
        truth.write_bytes(honest[0]), picture.write_bytes(honest[1])
    assert "CHAIR_S" in suite.run(selection(data), again, tmp_path / "out")["chair"] and again.asked == []


def test_an_answer_that_was_edited_is_not_used(data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    honest = suite.run(selection(data), Answers(), tmp_path / "out")
    file = tmp_path / "out" / "pope" / "answers.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    for number, edited in ((0, lines[0].replace('"yes"', '"no"')), (2, lines[2].replace('"answer_id"', '"answer"'))):
        assert edited != lines[number]
        file.write_text("".join([*lines[:number], edited, *lines[number + 1 :]]))
        caplog.clear()
        again = Answers()
        assert suite.run(selection(data), again, tmp_path / "out") == honest
        assert again.asked == [json.loads(lines[number])["question_id"]]
        assert "answers that were changed after they were given: 1" in caplog.text
        assert (file.parent / "answers_not_used.jsonl").read_text().endswith(edited)
        more = Answers()
        assert suite.run(selection(data), more, tmp_path / "out") == honest and more.asked == []


def test_what_is_missing_is_reported_and_the_others_are_scored(data: Path, tmp_path: Path) -> None:
    wanted = selection(data) | {"chair": CHAIR(data=tmp_path / "nowhere")}
    assert list(suite.check(wanted)) == ["chair"]
    results = suite.run(wanted, Answers(), tmp_path / "out")
    assert "synonyms.txt cannot be read" in results["chair"]["missing"]
    assert results["chair"]["cure"] == f"python -m povid.benchmarks fetch chair --data {tmp_path / 'nowhere'}"
    assert results["pope"]["f1"] == pytest.approx(50.0)


def test_missing_and_broken_pictures_are_found_before_any_answer(data: Path, tmp_path: Path) -> None:
    answers = Answers()
    (data / "images" / "a_2.png").write_bytes(b"no picture")
    found = suite.run(selection(data), answers, tmp_path / "out")
    assert "chair question 'a_2'" in found["chair"]["missing"] and "not a readable image" in found["chair"]["missing"]
    (data / "images" / "a_2.png").unlink()
    found = suite.run(selection(data), answers, tmp_path / "out")
    assert "pope: 1 of 3 images are missing, the first is" in found["pope"]["missing"]
    assert answers.asked == []


def test_settings_have_types_and_bounds() -> None:
    for settings, sentence in (
        ({"data": "x", "promt": "?"}, "chair.promt: there is no such setting; did you mean 'prompt'?"),
        ({"prompt": "?"}, "chair.data: missing; give it a value"),
        ({"data": "x", "max_new_tokens": 0}, "chair.max_new_tokens: found 0"),
        ({"data": "x", "max_new_tokens": True}, "chair.max_new_tokens: found True"),
        ({"data": "x", "temperature": -0.1, "number": 0}, "chair.temperature: found -0.1"),
        ({"data": "x", "temperature": float("nan")}, "chair.temperature: found nan"),
    ):
        with pytest.raises(Fault) as caught:
            validated(CHAIR, settings, "chair")
        assert sentence in str(caught.value)


class Words(Benchmark):
    """A user's own benchmark: the share of answers that have at least ``least`` words, judged as ``judged`` says."""

    name = "words"
    official = "nobody's"
    columns = (Column("words.share", "Words", "high", 1),)

    least: int = Field(2, ge=1)

    def questions(self) -> list[Question]:
        return [Question(n, None, text, {}) for n, text in enumerate((self.data / "words.txt").read_text().split())]

    def score(self, questions: Sequence[Question], answers: Sequence[str], judge: Any = None) -> Score:
        if not self.least < 9:
            raise ZeroDivisionError("float division by zero")
        long = [len(answer.split()) >= self.least for answer in answers]
        return Score({"share": 100 * sum(long) / len(long), "judged": judge is not None}, [])

    def write_official(self, questions: Sequence[Question], answers: Sequence[str], folder: Path) -> Path:
        return write_text(folder / "words.json", json.dumps(list(answers)))

    def read_answers(self, file: Path, questions: Sequence[Question]) -> list[str]:
        return json.loads(file.read_text())


class Judged(Words):
    judged = "always"
    official_judge = "gpt"


class Helped(Words):
    judged = "optional"
    official_judge = "gpt"


@pytest.fixture
def words(data: Path) -> Path:
    (data / "words.txt").write_text("one two three")
    return data


def test_somebodys_own_benchmark_is_answered_scored_and_shown(words: Path, tmp_path: Path) -> None:
    wanted = {"words": Words(data=words), "long_words": Words(data=words, least=8)}
    results = suite.run(wanted, Answers(), tmp_path / "out")
    assert (results["words"]["share"], results["long_words"]["share"]) == (100.0, 0.0)
    assert (tmp_path / "out" / "words" / "official" / "words.json").is_file()
    assert suite.columns(wanted) == [
        {"key": f"{name}.share", "title": "Words", "better": "high", "decimals": 1, "subscript": ""} for name in wanted
    ]


def test_an_error_in_one_scoring_leaves_the_others(words: Path, tmp_path: Path) -> None:
    results = suite.run({"words": Words(data=words, least=9), **selection(words)}, Answers(), tmp_path / "out")
    assert results["words"]["missing"] == "scoring failed: ZeroDivisionError: float division by zero"
    command = f"python -m povid.benchmarks {__name__}.Words --answers {tmp_path / 'out' / 'words' / 'official'}"
    assert results["words"]["cure"].startswith(command)
    assert results["pope"]["f1"] == pytest.approx(50.0)


class Keyless:
    def endpoint(self, benchmark: Benchmark) -> None:
        raise Fault("no key for gpt; set it")


class Ready:
    def endpoint(self, benchmark: Benchmark) -> Ready:
        assert benchmark.judged != "never"
        return self

    def reach(self) -> None:
        pass


class Away(Ready):
    def reach(self) -> None:
        raise Fault("gpt cannot be reached")


def test_a_disk_that_fills_up_while_scoring_stops_the_run(words: Path, tmp_path: Path) -> None:
    class Full(Words):
        def score(self, *_: Any) -> Score:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left"):
        suite.run({"words": Full(data=words), **selection(words)}, Answers(), tmp_path / "out")


def test_a_judged_benchmark_without_judge_keeps_its_answers(words: Path, tmp_path: Path) -> None:
    wanted = {"words": Judged(data=words)}
    for judge, reason in ((None, "words needs a judge, and none is configured"), (Keyless(), "no key for gpt; set it")):
        assert suite.check(wanted, judge)["words"]["missing"] == reason
        result = suite.run(wanted, Answers(), tmp_path / "out", judge)["words"]
        assert result["missing"] == f"answered but not judged: {reason}"
        assert result["cure"].endswith("--judge-model MODEL")
    assert len((tmp_path / "out" / "words" / "answers.jsonl").read_text().splitlines()) == 3
    assert suite.check(wanted, Ready()) == {}
    assert suite.check(wanted, Away())["words"]["missing"] == "gpt cannot be reached"
    assert suite.run(wanted, Answers(), tmp_path / "out", Away())["words"]["judged"]  # it may be back by now


def test_a_judge_is_used_only_where_it_can_and_may_be(words: Path, tmp_path: Path) -> None:
    for judge, used in ((None, False), (Keyless(), False), (Ready(), True)):
        wanted = {"helped": Helped(data=words), "words": Words(data=words)}
        assert suite.check(wanted, judge) == {}
        results = suite.run(wanted, Answers(), tmp_path / "out", judge)
        assert (results["helped"]["judged"], results["words"]["judged"]) == (used, False)


def test_questions_are_read_once_for_check_and_run(words: Path, tmp_path: Path) -> None:
    wanted = {"words": Words(data=words)}
    (words / "words.txt").unlink()
    with pytest.raises(FileNotFoundError):
        suite.check(wanted)
    (words / "words.txt").write_text("one two")
    suite.check(wanted)
    (words / "words.txt").unlink()
    assert suite.run(wanted, Answers(), tmp_path / "out")["words"]["share"] == 100.0


def test_a_fault_while_answering_keeps_what_came_before(data: Path, tmp_path: Path) -> None:
    def breaks(questions: Sequence[Question], decoding: Decoding) -> Iterator[tuple[int, str]]:
        yield 1, "A cat."
        raise Fault("question 'a_3': the server is silent; start it.")

    result = suite.run({"chair": CHAIR(data=data)}, breaks, tmp_path / "out")["chair"]
    assert result["missing"] == "question 'a_3': the server is silent; start it."
    rest = Answers()
    assert "CHAIR_S" in suite.run({"chair": CHAIR(data=data)}, rest, tmp_path / "out")["chair"]
    assert rest.asked == ["a_3", "a_1"]


def test_a_broken_line_is_named(data: Path, tmp_path: Path) -> None:
    suite.run({"chair": CHAIR(data=data)}, Answers(), tmp_path / "out")
    file = tmp_path / "out" / "chair" / "answers.jsonl"
    first, _second, third = file.read_text().splitlines()
    for line in ('{"question_id": "a_9", "text": "x"}', "no json", '{"question_id": "a_1"}', "[]"):
        file.write_text("\n".join([first, line, third]) + "\n")
        result = suite.run({"chair": CHAIR(data=data)}, Answers(), tmp_path / "out")["chair"]
        assert "answers.jsonl line 2 is not an answer to an unanswered question" in result["missing"]


KILLED = """
import os, signal, sys, time
from pathlib import Path
from povid.benchmarks import suite
from povid.benchmarks.pope import POPE

def slowly(questions, decoding):
    for index in range(len(questions)):
        if index == 3:
            with open(sys.argv[2] + "/pope/answers.jsonl", "ab") as file:
                file.write(b'{"question_id": "random/4", "prompt": "Is th')  # the line that the kill tears
            print("torn", flush=True)
            signal.pause()
        yield index, "no"

suite.run({"pope": POPE(data=sys.argv[1])}, slowly, Path(sys.argv[2]))
"""


def test_killed_in_the_middle_of_a_line_and_resumed(data: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(data), str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ},
    )
    assert process.stdout is not None and process.stdout.readline() == "torn\n"
    process.send_signal(signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL
    file = tmp_path / "out" / "pope" / "answers.jsonl"
    assert not file.read_bytes().endswith(b"\n")
    rest = Answers()
    results = suite.run({"pope": POPE(data=data)}, rest, tmp_path / "out")
    assert sorted(rest.asked) == ["random/4", "random/5", "random/6"]
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert sorted(row["question_id"] for row in rows) == [f"random/{i}" for i in range(1, 7)]
    assert {row["question_id"]: row["text"] for row in rows}["random/3"] == "no"
    assert results["pope"]["random"]["yes_ratio"] == 50.0
