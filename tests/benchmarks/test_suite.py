"""The suite: what is missing is told before anything is answered, and nothing answered is lost or asked again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import yaml
from PIL import Image

from povid.benchmarks import chair, pope, suite
from povid.fault import Fault
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


def selection(data: Path) -> dict[str, dict]:
    return {"chair": {"data": str(data)}, "pope": {"data": str(data), "suffix": ""}}


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
    assert rows[0] == {
        "question_id": "random/6",
        "prompt": "Is there a dog in the image?",
        "text": "yes",
        "answer_id": rows[0]["answer_id"],
        "model_id": "povid",
        "metadata": {},
    }
    questions = pope.load(data, suffix="")
    official = tmp_path / "out" / "pope" / "official" / "coco_pope_random_answers.json"
    assert pope.read_answers(official, questions) == ["yes"] * 6


def test_a_second_run_asks_nothing_again(data: Path, tmp_path: Path) -> None:
    first = suite.run(selection(data), Answers(), tmp_path / "out")
    again = Answers()
    assert suite.run(selection(data), again, tmp_path / "out") == first and again.asked == []


def test_an_interrupted_run_goes_on_where_it_stopped(data: Path, tmp_path: Path) -> None:
    half = suite.run(selection(data), Answers(stop_after=5), tmp_path / "out")
    assert "CHAIR_S" in half["chair"]
    assert half["pope"]["missing"] == "pope: 2 of 6 questions were answered; run again to go on."
    rest = Answers()
    whole = suite.run(selection(data), rest, tmp_path / "out")
    assert len(rest.asked) == 4
    assert whole == suite.run(selection(data), Answers(), tmp_path / "other")


def test_decoding_can_be_set(data: Path, tmp_path: Path) -> None:
    answers = Answers()
    suite.run({"chair": {"data": data, "temperature": 0.2, "max_new_tokens": 7}}, answers, tmp_path / "out")
    assert answers.decodings == [Decoding(max_new_tokens=7, temperature=0.2)]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"prompt": "What is this?"}, "answered with another questions"),
        ({"max_new_tokens": 3}, "answered with another decoding"),
        ({"model": "other"}, "answered with another model"),
    ],
)
def test_answers_to_something_else_are_refused(data: Path, tmp_path: Path, change: dict, sentence: str) -> None:
    settings = {"data": data}
    suite.run({"chair": settings}, Answers(), tmp_path / "out")
    model = change.pop("model", "povid")
    again = Answers()
    result = suite.run({"chair": settings | change}, again, tmp_path / "out", model=model)["chair"]
    assert sentence in result["missing"] and "choose another output folder" in result["missing"]
    assert again.asked == []


def test_what_is_missing_is_told_and_the_others_are_scored(data: Path, tmp_path: Path) -> None:
    wanted = selection(data) | {"chair": {"data": tmp_path / "nowhere"}}
    assert list(suite.check(wanted)) == ["chair"]
    results = suite.run(wanted, Answers(), tmp_path / "out")
    assert "synonyms.txt cannot be read" in results["chair"]["missing"]
    assert results["chair"]["cure"] == f"python -m povid.benchmarks fetch chair --data {tmp_path / 'nowhere'}"
    assert results["pope"]["f1"] == pytest.approx(50.0)


def test_missing_and_broken_pictures_are_found_before_any_answer(data: Path, tmp_path: Path) -> None:
    answers = Answers()
    (data / "images" / "a_2.png").write_bytes(b"no picture")
    found = suite.run(selection(data), answers, tmp_path / "out")
    assert "chair question 'a_2'" in found["chair"]["missing"] and "no readable picture" in found["chair"]["missing"]
    (data / "images" / "a_2.png").unlink()
    found = suite.run(selection(data), answers, tmp_path / "out")
    assert "pope lacks 1 of 3 pictures, the first is" in found["pope"]["missing"]
    assert answers.asked == []


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        ({"chiar": {"data": "x"}}, "There is no benchmark 'chiar'; did you mean 'chair'?"),
        ({"chair": {"data": "x", "promt": "?"}}, "Benchmark chair has no setting 'promt'; did you mean 'prompt'?"),
        ({"chair": {"prompt": "?"}}, "Benchmark chair has no data"),
    ],
)
def test_mistakes_in_the_configuration_stop_everything(tmp_path: Path, wanted: dict, sentence: str) -> None:
    answers = Answers()
    with pytest.raises(Fault) as caught:
        suite.run(wanted, answers, tmp_path / "out")
    assert sentence in str(caught.value) and answers.asked == []


def test_a_fault_in_one_scoring_leaves_the_others(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(questions: object, answers: object) -> None:
        raise ZeroDivisionError("float division by zero")

    monkeypatch.setattr(chair, "score", broken)
    results = suite.run(selection(data), Answers(), tmp_path / "out")
    assert results["chair"]["missing"] == "scoring failed: ZeroDivisionError: float division by zero"
    assert f"--answers {tmp_path / 'out' / 'chair' / 'official'}" in results["chair"]["cure"]
    assert results["pope"]["f1"] == pytest.approx(50.0)


def test_a_judged_benchmark_without_judge_keeps_its_answers(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def needs(questions: object, answers: object, judge: object) -> None:
        raise AssertionError("no judge, no scoring")

    monkeypatch.setattr(chair, "score", needs)
    wanted = {"chair": {"data": data}}
    result = suite.run(wanted, Answers(), tmp_path / "out")["chair"]
    assert result["missing"] == "answered, not judged: chair needs a judge, and none is configured"
    assert result["cure"].endswith("--judge-model MODEL")
    assert len((tmp_path / "out" / "chair" / "answers.jsonl").read_text().splitlines()) == 3
    assert suite.check(wanted)["chair"]["missing"] == "chair needs a judge, and none is configured"
    result = suite.run(wanted, Answers(), tmp_path / "out", judge=Keyless())["chair"]
    assert result["missing"] == "answered, not judged: no key for gpt; set it"


class Keyless:
    def endpoint(self, benchmark: str) -> None:
        raise Fault("no key for gpt; set it")


def test_judge_and_scoring_settings_reach_the_score(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a judge only helps, one that cannot be used is none."""
    seen: list[tuple[object, int]] = []

    def helped(questions: object, answers: object, judge: object = None, runs: int = 1) -> Score:
        seen.append((judge, runs))
        return Score({}, [])

    class Ready:
        def endpoint(self, benchmark: str) -> None:
            assert benchmark == "chair"

    ready = Ready()
    monkeypatch.setattr(chair, "score", helped)
    for judge in (None, Keyless(), ready):
        suite.run({"chair": {"data": data, "runs": 5}}, Answers(), tmp_path / "out", judge=judge)
    assert seen == [(None, 5), (None, 5), (ready, 5)]
    assert suite.check({"chair": {"data": data}}) == {}


def test_a_benchmark_without_judge_asks_for_none(data: Path, tmp_path: Path) -> None:
    class Strict:
        def endpoint(self, benchmark: str) -> None:
            raise AssertionError(f"{benchmark} is not judged")

    assert "CHAIR_S" in suite.run({"chair": {"data": data}}, Answers(), tmp_path / "out", judge=Strict())["chair"]


def test_shipped_settings_are_known() -> None:
    """Every key of conf/benchmarks is one that the benchmark takes."""
    folder = Path(__file__).resolve().parents[2] / "conf" / "benchmarks"
    for name in suite.BENCHMARKS:
        settings = yaml.safe_load((folder / f"{name}.yaml").read_text())
        suite.check_settings(name, settings[name])


def test_a_fault_while_answering_keeps_what_came_before(data: Path, tmp_path: Path) -> None:
    def breaks(questions: Sequence[Question], decoding: Decoding) -> Iterator[tuple[int, str]]:
        yield 1, "A cat."
        raise Fault("question 'a_3': the server is silent; start it.")

    result = suite.run({"chair": {"data": data}}, breaks, tmp_path / "out")["chair"]
    assert result["missing"] == "question 'a_3': the server is silent; start it."
    rest = Answers()
    assert "CHAIR_S" in suite.run({"chair": {"data": data}}, rest, tmp_path / "out")["chair"]
    assert rest.asked == ["a_3", "a_1"]


@pytest.mark.parametrize("line", ['{"question_id": "a_9", "text": "x"}', "no json", '{"question_id": "a_1"}', "[]"])
def test_a_spoilt_line_is_named(data: Path, tmp_path: Path, line: str) -> None:
    suite.run({"chair": {"data": data}}, Answers(), tmp_path / "out")
    file = tmp_path / "out" / "chair" / "answers.jsonl"
    first, _second, third = file.read_text().splitlines()
    file.write_text("\n".join([first, line, third]) + "\n")
    result = suite.run({"chair": {"data": data}}, Answers(), tmp_path / "out")["chair"]
    assert "answers.jsonl line 2 is no answer to a question still open" in result["missing"]


KILLED = """
import os, signal, sys, time
from pathlib import Path
from povid.benchmarks import suite

def slowly(questions, decoding):
    for index in range(len(questions)):
        if index == 3:
            with open(sys.argv[2] + "/pope/answers.jsonl", "ab") as file:
                file.write(b'{"question_id": "random/4", "prompt": "Is th')  # the line that the kill tears
            print("torn", flush=True)
            signal.pause()
        yield index, "no"

suite.run({"pope": {"data": sys.argv[1]}}, slowly, Path(sys.argv[2]))
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
    results = suite.run({"pope": {"data": data}}, rest, tmp_path / "out")
    assert sorted(rest.asked) == ["random/4", "random/5", "random/6"]
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert sorted(row["question_id"] for row in rows) == [f"random/{i}" for i in range(1, 7)]
    assert {row["question_id"]: row["text"] for row in rows}["random/3"] == "no"
    assert results["pope"]["random"]["yes_ratio"] == 50.0
