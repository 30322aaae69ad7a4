"""benchmarks.limit: a quick look at the first pictures, whose numbers are never taken for others."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from povid.benchmarks import __main__ as command
from povid.benchmarks import suite
from povid.benchmarks.chair import CHAIR
from povid.benchmarks.mmbench import COPY, MMBench
from povid.benchmarks.mme import MME
from povid.benchmarks.pope import POPE
from povid.benchmarks.science_qa import ScienceQA
from povid.fault import Fault, validated
from povid.model.question import Decoding, Question

NAMES = [f"p{number}" for number in range(6)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Six pictures with CHAIR's files and two POPE splits of two questions each; the second begins at the last."""
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    (folder / "synonyms.txt").write_text("cat\ndog\n")
    (folder / "objects.json").write_text(json.dumps({name: ["cat"] for name in NAMES}))
    for number, name in enumerate(NAMES):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / "images" / f"{name}.png")
    for split, names in (("random", NAMES), ("popular", NAMES[::-1])):
        rows = [
            {
                "image": f"{name}.png",
                "text": f"Is there a {word} in the image?",
                "label": "yes" if word == "cat" else "no",
            }
            for name in names
            for word in ("cat", "dog")
        ]
        lines = [json.dumps({"question_id": number} | row) for number, row in enumerate(rows, 1)]
        (folder / f"coco_pope_{split}.json").write_text("\n".join(lines))
    return folder


def right(questions: Sequence[Question], decoding: Decoding):
    for number, question in enumerate(questions):
        yield number, question.meta.get("label", "A cat.")


def test_a_run_is_asked_about_whole_pictures_and_says_so(data: Path, tmp_path: Path) -> None:
    """Two of six pictures: 2 of 6 captions, and 8 of 24 POPE questions, of both splits though their orders differ."""
    chosen = {"chair": CHAIR(data=str(data), limit=2), "pope": POPE(data=str(data), suffix="", limit=2)}
    assert {question.meta["image"] for question in chosen["pope"].loaded()} == {"p0.png", "p1.png"}
    scores = suite.run(chosen, right, tmp_path / "out")
    assert scores["chair"]["limit"] == {"limit": 2, "asked": 2, "of": 6}
    assert scores["pope"]["limit"] == {"limit": 2, "asked": 8, "of": 24}
    assert scores["pope"]["f1"] == 100 and scores["pope"]["popular"]["questions"] == 4
    assert "without_caption" not in scores["chair"], "pictures beyond the limit are not missing"

    all_of_them = suite.run({"chair": CHAIR(data=str(data), limit=6)}, right, tmp_path / "whole")["chair"]
    assert "limit" not in all_of_them, "a limit that leaves nothing out changes no number"
    assert all_of_them["captions"] == 6

    other = suite.run({"chair": CHAIR(data=str(data))}, right, tmp_path / "out")["chair"]
    assert "under another benchmarks.limit (2 there, None now)" in other["missing"] and other["open"]
    with pytest.raises(Fault, match="limit: found 0, needed at least 1"):
        validated(CHAIR, {"data": data, "limit": 0})


def test_files_of_all_answers_and_of_the_first_are_scored(data: Path, tmp_path: Path, capsys) -> None:
    """What a limited run writes, and a file that answers everything, have the same score under --limit."""
    suite.run({"pope": POPE(data=str(data), suffix="", limit=2)}, right, tmp_path / "out")
    suite.run({"pope": POPE(data=str(data), suffix="")}, right, tmp_path / "all")
    suite.run({"chair": CHAIR(data=str(data))}, right, tmp_path / "all")
    official = "official/llava_answers.jsonl"
    for name, answers in (
        ("pope", tmp_path / "out" / "pope" / official),
        ("pope", tmp_path / "out" / "pope" / "official"),
        ("pope", tmp_path / "all" / "pope" / official),
        ("chair", tmp_path / "all" / "chair" / "official" / "captions.jsonl"),
    ):
        if answers.is_dir():
            (answers / "llava_pope_test.jsonl").unlink()
        arguments = [name, "--answers", answers, "--data", data, "--limit", "2", "--json", tmp_path / "scores.json"]
        assert command.main([str(argument) for argument in arguments]) == 0, answers
        scores = json.loads((tmp_path / "scores.json").read_text())["scores"]
        asked, of = {"pope": (8, 24), "chair": (2, 6)}[name]
        assert scores["limit"] == {"limit": 2, "asked": asked, "of": of}
        assert scores["f1" if name == "pope" else "coverage"] == 100
        assert f"{asked} questions of {of}, as --limit 2 says" in capsys.readouterr().out
    assert command.main(["pope", "--answers", str(tmp_path / "out/pope" / official), "--data", str(data)]) == 2
    assert "8 answers" in capsys.readouterr().err


def test_what_is_scored_together_stays_together(tmp_path: Path) -> None:
    """MME keeps both questions of a picture in every subtask, MMBench all rotations, ScienceQA what has no picture."""
    for subtask in ("existence", "count"):
        (tmp_path / f"{subtask}.txt").write_text(
            "".join(f"{name}.jpg\tIs it {word}?\tYes\n" for name in NAMES for word in ("a", "b"))
        )
    assert [question.id for question in MME(data=str(tmp_path), limit=1).loaded()] == [
        f"{subtask}/p0/{number}" for subtask in ("existence", "count") for number in (0, 1)
    ]

    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, format="PNG")
    cell = base64.b64encode(picture.getvalue()).decode()
    rows = [f"{index}\tWhat?\tone\ttwo\tA\t{cell}" for index in (7, 8, 9, 7 + COPY, 9 + COPY)]
    (tmp_path / "mmbench_dev_20230712.tsv").write_text("index\tquestion\tA\tB\tanswer\timage\n" + "\n".join(rows))
    bench = MMBench(data=str(tmp_path), limit=2)
    assert [question.id for question in bench.loaded()] == [7, 8, 7 + COPY]
    assert bench.limited == {"limit": 2, "asked": 3, "of": 5}

    problems = {
        name: {"question": "?", "choices": ["x", "y"], "answer": 0, "hint": "", "image": image}
        for name, image in (("1", None), ("2", "image.png"), ("3", None), ("4", "image.png"))
    }
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"test": list(problems)}))
    science = ScienceQA(data=str(tmp_path), limit=2)
    assert [question.id for question in science.loaded()] == ["1", "2"]
    every = tmp_path / "answers.jsonl"
    every.write_text("\n".join(json.dumps({"question_id": name, "text": "A"}) for name in problems))
    score = science.score_file(every, science.loaded()).scores
    assert (score["questions"], score["img_questions"], score["missing"]) == (2, 1, 0)
