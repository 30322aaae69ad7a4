"""Two runs compared answer by answer: figures and tests by hand, pictures as clusters, refusals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from povid.benchmarks.benchmark import paired
from povid.fault import Fault
from povid.report import __main__ as command
from povid.report.compare import compare

ASKED = {"texts": "t", "pictures": "p", "truth": "g", "decoding": {"temperature": 0.0}, "model": "m"}


def run(place: Path, records: Sequence[dict[str, Any]], name: str = "pope", scores: Any = None, **asked: Any) -> Path:
    folder = place / "benchmarks" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "asked.json").write_text(json.dumps(ASKED | {"model": place.name} | asked))
    (folder / "scores.json").write_text(json.dumps({"scores": scores or {}, "records": records}))
    return place


def answer(picture: int, right: bool, group: str | None = None) -> dict[str, Any]:
    return {"correct": right, "paired": paired(picture, {"accuracy": [int(right), 1]}, group)}


def caption(picture: int, mentions: str, there: int) -> dict[str, Any]:
    wrong = mentions.count("h")
    sums = {
        "CHAIR_S": [int(wrong > 0), 1],
        "CHAIR_I": [wrong, len(mentions)],
        "coverage": [mentions.count("n"), there],
    }
    return {"paired": paired(picture, sums, mentions=mentions)}


def test_figures_and_mcnemar_by_hand(tmp_path: Path) -> None:
    """Group x: A right in 1 of 4, B in 4 of 4; group y: A right in 3 of 4, B in 3 of 4, one of which A misses.

    Means of the groups: 50 and 87.5. Only A is right once, only B four times: p = 2 (1 + 5) / 32 = 0.375.
    """
    a = [answer(i, i == 0, "x") for i in range(4)] + [answer(i, i < 3, "y") for i in range(4)]
    b = [answer(i, True, "x") for i in range(4)] + [answer(i, i > 0, "y") for i in range(4)]
    found = compare(run(tmp_path / "a", a), run(tmp_path / "b", b), resamples=500)["benchmarks"]["pope"]
    accuracy = found["figures"]["accuracy"]
    assert [accuracy[part]["value"] for part in ("a", "b", "difference")] == [50, 87.5, 37.5]
    assert all(one["low"] <= one["value"] <= one["high"] for one in accuracy.values())
    assert found["mcnemar"] == {"questions": 8, "only_a": 1, "only_b": 4, "p": pytest.approx(0.375)}
    assert (found["questions"], found["pictures"]) == (8, 4)
    other = compare(tmp_path / "b", tmp_path / "a", resamples=500)["benchmarks"]["pope"]["figures"]["accuracy"]
    assert other["difference"]["low"] == -accuracy["difference"]["high"]


def test_more_questions_about_the_same_pictures_narrow_nothing(tmp_path: Path) -> None:
    """Twenty pictures; asked nine times with the same outcome, each still counts once. Of pictures of their own, the
    nine answers would narrow the interval to about a third."""

    def width(times: int, apart: bool) -> float:
        runs = []
        for name, right in (("a", lambda i: i % 2 == 0), ("b", lambda i: i % 4 > 0)):
            records = [answer(i + 20 * n * apart, right(i)) for n in range(times) for i in range(20)]
            runs.append(run(tmp_path / f"{name}{times}{apart}", records))
        difference = compare(*runs, resamples=2000)["benchmarks"]["pope"]["figures"]["accuracy"]["difference"]
        assert difference["value"] == 25
        return difference["high"] - difference["low"]

    assert width(9, apart=False) == width(1, apart=False)
    assert width(9, apart=True) == pytest.approx(width(1, apart=False) / 3, rel=0.15)


def test_chair_at_matched_coverage_by_hand(tmp_path: Path) -> None:
    """Two true objects per picture. A names one, a wrong one, then the other: CHAIR_I 1/3, coverage 100. B names one
    and stops: CHAIR 0, coverage 50. A cut after two mentions also has coverage 50: CHAIR_I 1/2, CHAIR_S 100.

    In the second case A names both at once and then the wrong one: cut at 50, it has no hallucination either.
    """
    b = run(tmp_path / "b", [caption(i, "n", 2) for i in range(6)], "chair")
    for mentions, chair_s, chair_i in (("nhn", 100, 50), ("nnh", 0, 0)):
        a = run(tmp_path / "a", [caption(i, mentions, 2) for i in range(6)], "chair")
        found = compare(a, b, resamples=200)["benchmarks"]["chair"]
        assert found["figures"]["CHAIR_I"]["a"]["value"] == pytest.approx(100 / 3)
        matched = found["matched_coverage"]
        assert matched["coverage"]["value"] == 50
        assert [matched[key]["a"]["value"] for key in ("CHAIR_S", "CHAIR_I")] == [chair_s, chair_i]
        assert [matched[key]["difference"]["value"] for key in ("CHAIR_S", "CHAIR_I")] == [-chair_s, -chair_i]
        assert "mcnemar" not in found


def test_between_two_numbers_of_mentions_figures_are_interpolated(tmp_path: Path) -> None:
    """B names one of two objects in every second picture: coverage 25. A has coverage 0 and CHAIR_I 100 after its first
    mention, 50 and 50 after the second: halfway, 75."""
    a = run(tmp_path / "a", [caption(i, "hnn", 2) for i in range(8)], "chair")
    b = run(tmp_path / "b", [caption(i, "n" if i % 2 else "", 2) for i in range(8)], "chair")
    matched = compare(a, b, resamples=200)["benchmarks"]["chair"]["matched_coverage"]
    assert matched["coverage"]["value"] == 25 and matched["CHAIR_I"]["a"]["value"] == 75
    swapped = compare(b, a, resamples=200)["benchmarks"]["chair"]["matched_coverage"]
    assert swapped["CHAIR_I"]["difference"]["value"] == 75


def test_runs_that_were_asked_something_else_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = [answer(i, True) for i in range(3)]
    a = run(tmp_path / "a", good)
    for change, sentence in [
        ({"texts": "other"}, "have different questions, so their answers are not pairs"),
        ({"pictures": "other"}, "have different pictures"),
        ({"truth": "other"}, "have different reference answers"),
        ({"truth": None}, "have different reference answers"),
        ({"scores": {"judge": "x"}}, "judged by None in"),
        ({"records": good[:2]}, "has 3 records and"),
        ({"records": [answer(7, True)] * 3}, "have records about 0 and 7 at the same place"),
        ({"records": [{"correct": True}] * 3, "only": "pope"}, "an earlier version scored it (then move its results"),
        ({"records": [{"paired": {"sums": 3}}] * 3}, "has a record that cannot be compared"),
        ({"name": "chair"}, "scored no benchmark in common"),
        ({"only": "mme"}, "mme was not scored in"),
    ]:
        place = tmp_path / sentence.replace("/", "")[:20] / str(len(change))
        kept = {key: value for key, value in change.items() if key not in ("only", "records")}
        b = run(place, change.get("records", good), **kept)
        arguments = ["compare", str(a), str(b)] + (["--benchmark", change["only"]] if "only" in change else [])
        assert command.main(arguments) == 2, sentence
        error = capsys.readouterr().err
        assert sentence in error and error.count("\n") == 1, error
    with pytest.raises(Fault, match="holds no folder benchmarks"):
        compare(tmp_path, a)


def test_command_prints_and_writes_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = run(tmp_path / "a", [answer(i, False) for i in range(30)])
    b = run(tmp_path / "b", [answer(i, i > 0) for i in range(30)], decoding={"temperature": 0.2})
    for place in (a, b):
        run(place, [{"score": 3}], "mmhal")
    out = tmp_path / "new.json"
    assert command.main(["compare", str(a), str(b), "--resamples", "300", "--json", str(out)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "accuracy 0.0 [0.0, 0.0] 96.7 [86.7, 100.0] +96.7 [+86.7, +100.0] *" in printed
    assert "different settings: A temperature 0.0; B temperature 0.2" in printed and "mmhal is not compared" in printed
    assert "only A is right in 0, only B in 29" in printed
    found = json.loads(out.read_text())
    assert found == compare(a, b, resamples=300)
    assert command.main(["compare", str(a), str(b), "--resamples", "9"]) == 2
