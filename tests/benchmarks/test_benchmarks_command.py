"""``python -m povid.benchmarks``: somebody else's answers scored in one command, mistakes told in one sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from shared import shared

from povid.benchmarks import __main__ as command


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command_line = [sys.executable, "-m", "povid.benchmarks", *map(str, arguments)]
    return subprocess.run(command_line, capture_output=True, text=True)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "synonyms.txt").write_text("cat, kitten\ndog, puppy\n")
    (tmp_path / "objects.json").write_text('{"000000000001": ["cat"], "2": ["dog"], "3": ["kitten"], "4": []}')
    return tmp_path


def answer_file(data: Path, *captions: str) -> Path:
    rows = [json.dumps({"image_id": i, "caption": text}) for i, text in enumerate(captions, 1)]
    (data / "answers.jsonl").write_text("\n".join(rows))
    return data / "answers.jsonl"


def test_chair_prints_a_table_and_writes_every_decision(data: Path) -> None:
    """Captions: cat, dog of which dog is not there; nothing; empty. CHAIR_S 1/3, CHAIR_I 1/2, coverage 1/3: the
    official script counts the empty caption in this layout. In POVID's, to_chair.py leaves it out."""
    file = answer_file(data, "A cat and a dog.", "Grass.", "")
    done = run("chair", "--answers", file, "--data", data, "--json", data / "new" / "out.json")
    assert done.returncode == 0, done.stderr
    lines = dict(line.split()[:2] for line in done.stdout.splitlines()[1:7])
    assert (lines["CHAIR_S"], lines["CHAIR_I"], lines["coverage"]) == ("33.3", "50.0", "33.3")
    note = "empty captions, counted as the official chair.py does in this layout: 1; without them CHAIR_S is 50.0"
    assert note in done.stderr
    assert "note: images of objects.json without a caption, left out of the score: 1" in done.stderr
    rows = [{"id": f"{i}.jpg", "answer": text} for i, text in enumerate(["A cat and a dog.", "Grass.", ""], 1)]
    file.write_text("\n".join(map(json.dumps, rows)))
    done = run("chair", "--answers", file, "--data", data, "--json", data / "new" / "out.json")
    assert "note: empty captions, left out as in the official to_chair.py: 1 (the first is of image 3)" in done.stderr
    written = json.loads((data / "new" / "out.json").read_text())
    assert written["scores"]["CHAIR_S"] == 50.0 and written["scores"]["with_empty"]["CHAIR_S"] == 100 / 3
    assert [record.pop("paired")["mentions"] for record in written["records"]] == ["nh", "", ""]
    assert written["records"] == [
        {"image_id": 1, "objects": ["cat", "dog"], "hallucinated": ["dog"], "counted": True},
        {"image_id": 2, "objects": [], "hallucinated": [], "counted": True},
        {"image_id": 3, "objects": [], "hallucinated": [], "counted": False},
    ]


def test_pope_golden_answers(tmp_path: Path) -> None:
    case = json.loads(shared("golden/pope_answers_adversarial.json").read_text())
    official = shared("golden/coco_pope_adversarial.json")
    (tmp_path / official.name).write_text(official.read_text())
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in case["answers"]))
    done = run("pope", "--answers", tmp_path / "mine.jsonl", "--data", tmp_path, "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["scores"]["f1"] == pytest.approx(100 * case["expected"]["F1 score"], abs=1e-12)
    assert sum(record["correct"] for record in written["records"]) == case["expected"]["tp"] + case["expected"]["tn"]


def test_help_lists_the_benchmarks() -> None:
    done = run("--help")
    assert done.returncode == 0
    text = " ".join(done.stdout.split())
    assert (
        "Benchmarks: amber, chair, llava_bench, mm_vet, mmbench, mme, mmhal, pope, repope, science_qa, or a class"
        in text
    )
    assert "fetch NAME --data DIR" in text


def test_mistakes_are_one_sentence_and_status_2(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for change, sentence in [
        ({"name": "pop"}, "error: there is no benchmark 'pop'; did you mean 'pope'?"),
        ({"name": "bleu"}, "error: there is no benchmark 'bleu'; choose one of amber, chair, llava_bench"),
        ({"answers": "none.jsonl"}, "none.jsonl: no such file; give the answers to be scored"),
        ({"data": "nowhere"}, "nowhere does not exist; give the folder of the official files, or run"),
        ({"name": "pope"}, "holds none of coco_pope_{random,popular,adversarial}.json"),
        ({"name": "mmhal"}, "error: mmhal is scored by a judge; name its model with --judge-model"),
        (
            {"content": '{"image_id": 1, "caption": "a"}\n{"image_id": 1, "caption": "b"}'},
            "answers.jsonl line 2 describes image 1 again, after answers.jsonl line 1; keep one caption",
        ),
        ({"content": '{"image_id": 8, "caption": "a"}'}, "error: Image 8 (1 of 1 images) is not in"),
        ({"content": b"\xff\xfe"}, "answers.jsonl cannot be read"),
        ({"json": "."}, "error: "),
    ]:
        file = answer_file(data, "A cat.", "A dog.")
        if isinstance(content := change.get("content"), bytes):
            file.write_bytes(content)
        elif content is not None:
            file.write_text(content)
        arguments = [
            change.get("name", "chair"),
            "--answers",
            str(data / change.get("answers", "answers.jsonl")),
            "--data",
            str(data / change.get("data", "")),
        ]
        if "json" in change:
            arguments += ["--json", str(data / change["json"])]
        assert command.main(arguments) == 2
        error = capsys.readouterr().err
        assert sentence in error and error.count("\n") == 1 and error.startswith("error: ")


def test_status_2_reaches_the_shell(data: Path) -> None:
    done = run("chiar", "--answers", answer_file(data, "A cat."), "--data", data)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: there is no benchmark 'chiar'; did you mean 'chair'?\n"


def test_scoring_needs_no_torch(data: Path) -> None:
    code = (
        "import sys; from povid.benchmarks.__main__ import main; status = main(sys.argv[1:]); "
        "sys.exit(9 if 'torch' in sys.modules else status)"
    )
    file = answer_file(data, "A cat.")
    done = subprocess.run([sys.executable, "-c", code, "chair", "--answers", file, "--data", data], capture_output=True)
    assert done.returncode == 0, done.stderr


def test_fetch_refuses_an_unknown_name(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["fetch", "chiar", "--data", str(data)]) == 2
    assert capsys.readouterr().err == "error: there is no benchmark 'chiar'; did you mean 'chair'?\n"


def test_somebodys_own_benchmark_by_its_dotted_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "words.txt").write_text("one two")
    (tmp_path / "answers.json").write_text('["a long answer", "short"]')
    arguments = ["test_suite.Words", "--answers", str(tmp_path / "answers.json"), "--data", str(tmp_path)]
    assert command.main(arguments) == 0
    assert "share        50.0" in capsys.readouterr().out
    assert command.main(["fetch", "test_suite.Words", "--data", str(tmp_path)]) == 0
    assert "it names no files to download" in capsys.readouterr().out
    for name, sentence in (
        ("test_suite.Wrods", "test_suite.Wrods cannot be imported"),
        ("test_suite.Answers", "test_suite.Answers is not a subclass of povid.benchmarks.benchmark.Benchmark"),
        ("suite", "there is no benchmark 'suite'"),
    ):
        assert command.main([name, *arguments[1:]]) == 2
        assert sentence in capsys.readouterr().err


def test_table_shows_groups_and_gaps() -> None:
    scores = {"a": 1.25, "long": None, "group": {"n": 3}, "one": {"x": 1.0, "y": 2}, "two": {"x": 30.06, "y": 4}}
    assert (
        command.table(scores)
        == """\
a           1.2
long          -
              x          y
one         1.0          2
two        30.1          4
group:
  n          3"""
    )
