"""RePOPE against the official script's figures, and POPE's answers scored again without asking."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from povid.benchmarks import __main__ as command
from povid.benchmarks import suite
from povid.benchmarks.pope import POPE
from povid.benchmarks.repope import RePOPE, parse
from povid.fault import Fault

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "repope.json").read_text())


def write(folder: Path, kind: str, split: str, labels: dict[int, str]) -> None:
    rows = [
        {"question_id": i, "image": f"a_{i % 3}.png", "text": f"Is there a thing{i} in the image?", "label": label}
        for i, label in labels.items()
    ]
    folder.mkdir(exist_ok=True)
    (folder / f"coco_{kind}_{split}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Six questions of POPE, yes and no in turn. RePOPE leaves out 3 and 6 and corrects 1."""
    folder = tmp_path / "data"
    write(folder, "pope", "random", {i: ("no", "yes")[i % 2] for i in range(1, 7)})
    write(folder, "repope", "random", {1: "no", 2: "no", 4: "no", 5: "yes"})
    (folder / "images").mkdir()
    for i in range(3):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / "images" / f"a_{i}.png")
    return folder


def test_every_official_figure_of_the_golden_answers(tmp_path: Path) -> None:
    for split, pairs in GOLDEN["answers"].items():
        for kind in ("pope", "repope"):
            write(tmp_path / "data", kind, split, {i: label for i, (label, _) in enumerate(pairs, 1)})
    benchmark = RePOPE(data=tmp_path / "data")
    questions = benchmark.questions()
    answers = [GOLDEN["answers"][q.meta["split"]][q.meta["position"]][1] for q in questions]
    score = benchmark.score(questions, answers)
    for split, expected in GOLDEN["expected"].items():
        found = score.scores[split]
        for key, name in (("accuracy", "ACC"), ("precision", "Precision"), ("recall", "Recall"), ("f1", "F1")):
            assert found[key] == pytest.approx(100 * expected[name], abs=1e-12)
        assert found["yes_ratio"] == pytest.approx(100 * expected["Yes Ratio"], abs=1e-12)
        assert [found[key] for key in ("tp", "fp", "tn", "fn")] == [expected[key] for key in ("TP", "FP", "TN", "FN")]
    assert score.scores["f1"] == pytest.approx(100 * sum(e["F1"] for e in GOLDEN["expected"].values()) / 3)
    assert score.scores["unparsed"] == sum(parse(answer) is None for answer in answers) > 0
    assert score.scores["invalid"] > 1 and benchmark.notes(score)
    file = benchmark.write_official(questions, answers, tmp_path / "official")
    assert benchmark.for_answers(file).read_answers(file, questions) == answers


def answer(questions: Any, decoding: Any) -> Any:
    for index, question in enumerate(questions):
        ASKED.append(question.id)
        yield index, "Yes" if question.meta["question_id"] in (1, 5) else "No"


ASKED: list[str | int] = []


def test_popes_answers_serve_in_a_run_and_from_their_file(data: Path, tmp_path: Path) -> None:
    """Yes to 1 and 5, no to 2 and 4: POPE's F1 is 2*2/(2*2 + 1) = 80; RePOPE's, with 1 corrected to no, 2/3."""
    ASKED.clear()
    both = {"repope": RePOPE(data=data), "pope": POPE(data=data)}
    results = suite.run(both, answer, tmp_path / "out")
    assert list(results) == ["repope", "pope"] and len(ASKED) == 6
    assert (results["pope"]["f1"], results["repope"]["f1"]) == pytest.approx((80, 200 / 3))
    assert suite.run(both, answer, tmp_path / "out") == results and len(ASKED) == 6

    suite.run({"repope": RePOPE(data=data)}, answer, tmp_path / "alone")
    assert ASKED[6:] == [f"random/{i}" for i in (1, 4, 2, 5)]  # those about one picture side by side
    suite.run(both | {"repope": RePOPE(data=data, max_new_tokens=9)}, answer, tmp_path / "otherwise")
    assert len(ASKED) == 10 + 6 + 4  # decoded otherwise, so asked again

    official = tmp_path / "out" / "pope" / "official" / "coco_pope_random_answers.json"
    for file in (official, tmp_path / "out/pope/answers.jsonl", tmp_path / "out/repope/answers.jsonl"):
        out = tmp_path / "scores.json"
        assert command.main(["repope", "--answers", str(file), "--data", str(data), "--json", str(out)]) == 0
        assert json.loads(out.read_text())["scores"]["f1"] == results["repope"]["f1"]


def test_what_does_not_fit_is_told_in_one_sentence(data: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"question_id": "random/1", "text": "Yes"}\n')
    benchmark = RePOPE(data=data)
    with pytest.raises(Fault, match="has no answer to 3 of 4 questions, the first is 'random/"):
        benchmark.read_answers(file, benchmark.questions())
    write(data, "repope", "random", {9: "no"})
    with pytest.raises(Fault, match="'random/9', so they are of different versions"):
        benchmark.questions()
    (data / "coco_repope_random.json").unlink()
    with pytest.raises(Fault, match="fetch repope --data"):
        benchmark.questions()
