"""A judge beside the official gradings of the same answers."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from scipy import stats
from servers import ChatServer, Say, last_text

from povid.benchmarks import __main__ as command
from povid.benchmarks import calibrate
from povid.benchmarks.judge import Judge
from povid.benchmarks.llava_bench import LLaVABench
from povid.benchmarks.mm_vet import MMVet
from povid.benchmarks.mmhal import MMHal
from povid.fault import Fault

MODELS = ("llava-v1.5-7b", "llava-v1.5-13b")
CAPABILITIES = (["rec"], ["ocr", "math"], ["rec", "ocr"])
N = 12


def official(number: int, model: str) -> float:
    """0.0 to 0.9 and for the larger model 0.1 more, the mean of four gradings."""
    return (number * 7 % 10) / 10 + 0.1 * (model == MODELS[1])


@pytest.fixture
def mm_vet(tmp_path):
    rows = {
        f"v1_{n}": {"imagename": "a.png", "question": f"Q{n}?", "answer": "T", "capability": CAPABILITIES[n % 3]}
        for n in range(N)
    }
    (tmp_path / "mm-vet.json").write_text(json.dumps(rows))
    graded = tmp_path / "graded"
    graded.mkdir()
    for model in MODELS:
        (graded / f"{model}.json").write_text(json.dumps({f"v1_{n}": f"answer {n} of {model}" for n in range(N)}))
        for runs, shifts in ((1, [0.0]), (3, [0.05, -0.05, 0.0])):
            grades = {f"v1_{n}": {"score": [official(n, model) + shift for shift in shifts]} for n in range(N)}
            (graded / f"{model}_gpt-4-grade-{runs}runs.json").write_text(json.dumps(grades))
    return tmp_path


def asked(body) -> tuple[int, str]:
    number, model = re.search(r"answer (\d+) of (\S+)", last_text(body)).groups()
    return int(number), model


def test_bias_and_agreement_by_hand(mm_vet):
    """A judge that gives 0.1 less than the official one, but 0 where that gave 0, which 2 of the 24 answers got.

    So the bias is -22 x 0.1 / 24 = -0.0917.
    """

    def script(body, n):
        number, model = asked(body)
        return Say(f"{max(0, official(number, model) - 0.1):.1f}")

    with ChatServer(script) as server:
        judge = Judge(cache=mm_vet / "r.jsonl", base_url=server.url, model="mine")
        found = calibrate.calibrate(MMVet(data=mm_vet), judge, 300)
    ours, theirs = (
        [
            one[side]["grade"] if side == "judge" else np.mean([g["grade"] for g in one[side]])
            for one in found["records"]
        ]
        for side in ("judge", "official")
    )
    whole = found["grade"]["all"]
    assert whole["n"] == 24 == len(found["records"]) and found["judge"]["model"] == "mine"
    assert whole["bias"] == pytest.approx(-2.2 / 24) == np.mean(ours) - np.mean(theirs)
    assert whole["mean_absolute"] == pytest.approx(np.mean(np.abs(np.subtract(ours, theirs))))
    theirs = np.round(theirs, 9)  # means of equal grades are equal
    assert whole["spearman"] == pytest.approx(stats.spearmanr(theirs, ours).statistic)
    assert whole["kendall"] == pytest.approx(stats.kendalltau(theirs, ours).statistic)
    assert -0.1 <= whole["low"] < whole["bias"] < whole["high"] < -0.05
    assert whole["spearman_low"] < whole["spearman"] <= whole["spearman_high"] <= 1
    assert found["figure"]["all"]["difference"] == pytest.approx(100 * whole["bias"])
    assert set(found["grade"]) == {"all", "rec", "ocr", "math"}
    assert found["grade"]["math"]["n"] == 8 and found["grade"]["rec"]["n"] == 16
    for model in MODELS:
        grades = [official(n, model) for n in range(N)]
        expected = [100 * np.mean(grades) + shift for shift in (0, 5, -5, 0)]
        assert found["answers"][model]["official"] == pytest.approx(expected)
    assert found["official_with_itself"]["grade"] == {  # shifts differ by 0 once, 0.05 four times, 0.1 once
        "spearman": pytest.approx(1),
        "mean_absolute": pytest.approx((0 + 4 * 0.05 + 0.1) / 6),
    }


def test_an_interval_covers_what_it_should():
    """A judge of bias 0.3 with noise, 200 trials: 95 % intervals hold 0.3 in 88 % to 99 % of them.

    Answers of two models to one question share their noise; drawn one by one, they would make the interval too short.
    """
    random, hits = np.random.default_rng(0), 0
    for _ in range(200):
        truth = random.normal(size=(2, 40))
        noise = random.normal(size=40)
        found = calibrate._compared(
            lambda ratings: ratings["x"].mean(-1), {"x": truth}, {"x": truth + noise + 0.3}, np.arange(40), 200, random
        )
        hits += found["x"]["low"] <= 0.3 <= found["x"]["high"]
    assert 176 <= hits <= 198


def test_unreadable_judgements_are_counted_and_left_out_of_both_sides(mm_vet):
    """The judge never grades Q1 and gives all others what the official one gives: no bias at all."""

    def script(body, n):
        number, model = asked(body)
        return Say("hm" if number == 1 else f"{official(number, model):.1f}")

    with ChatServer(script) as server:
        judge = Judge(cache=mm_vet / "r.jsonl", base_url=server.url, model="mine")
        found = calibrate.calibrate(MMVet(data=mm_vet), judge, 100)
    assert [one["unreadable"] for one in found["answers"].values()] == [1, 1]
    whole = found["grade"]["all"]
    assert whole["n"] == 22 and whole["bias"] == pytest.approx(0, abs=1e-12) and whole["spearman"] == pytest.approx(1)


@pytest.fixture
def llava_bench(tmp_path):
    """Official scores of 6 questions: reference 8, model 4 or 6; each of three reviews the same."""
    kinds = ["conv", "detail", "complex"]
    rows = {
        "questions.jsonl": [
            {"question_id": n, "image": "1.jpg", "text": f"Q{n}?", "category": kinds[n % 3]} for n in range(6)
        ],
        "context.jsonl": [{"image": "1.jpg", "caption": "C"}],
        "answers_gpt4.jsonl": [{"question_id": n, "text": "R"} for n in range(6)],
    }
    for model in MODELS:
        rows[f"graded/{model}.jsonl"] = [{"question_id": n, "text": f"answer {n} of {model}"} for n in range(6)]
        for review in (1, 2, 3):
            said = [{"question_id": n, "content": f"8 {4 + 2 * (n % 2)}\nBecause."} for n in range(6)]
            rows[f"graded/{model}-eval{review}.jsonl"] = said
    for name, content in rows.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in content))
    return tmp_path


def test_the_command_prints_and_writes_it(llava_bench, capsys):
    """The judge gives 10 to the reference and 1 more than the official one to the model: 100 x 6/10 against 5/8."""
    out = llava_bench / "out.json"
    with ChatServer(lambda body, n: Say(f"10 {5 + 2 * (asked(body)[0] % 2)}")) as server:
        line = ["calibrate", "llava_bench", "--data", str(llava_bench), "--json", str(out), "--resamples", "100"]
        line += ["--judge", "open", "--judge-url", server.url, "--judge-cache", str(llava_bench / "r.jsonl")]
        assert command.main(line) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found["figure"]["all"]["official"] == pytest.approx(62.5) and found["figure"]["all"]["judge"] == 60.0
    assert found["model"]["all"]["bias"] == 1.0 and found["reference"]["all"]["bias"] == 2.0
    assert found["reference"]["all"]["spearman"] is None  # nothing varies
    assert found["model"]["conv"]["n"] == 4 and found["answers"][MODELS[0]]["official"] == [62.5] * 3
    assert {body["model"] for body in server.requests} == {found["judge"]["model"]} and found["judge"]["revision"]
    assert "llava-v1.5-7b: official 62.5, 62.5, 62.5; judge 60.0" in printed
    assert re.search(r"all +62\.5 +60\.0 +-2\.5 ", printed) and "prompt: povid-1" in printed


def test_what_is_missing_is_told(mm_vet, tmp_path, capsys):
    data = ["--data", str(mm_vet)]
    (mm_vet / "graded" / f"{MODELS[1]}.json").unlink()
    for line, sentence in (
        (["calibrate", "mm_vet", *data], "error: which judge? Name a file of settings with --judge"),
        (["calibrate", "mm_vet", *data, "--judge", "opne"], "there is no judge 'opne'; did you mean 'open'?"),
        (["calibrate", "mm_vet", *data, "--judge", "open", "--resamples", "5"], "an interval needs at least 100"),
        (["calibrate", "mm_vet", *data, "--judge", "open"], "run `python -m povid.benchmarks fetch mm_vet --data"),
    ):
        assert command.main(line) == 2
        assert sentence in capsys.readouterr().err
    with pytest.raises(Fault, match="no official gradings of mmhal are published; calibrate mm_vet or llava_bench"):
        calibrate.calibrate(MMHal(data=tmp_path), Judge(cache=tmp_path / "r.jsonl"))
    (mm_vet / "graded" / f"{MODELS[0]}.json").write_text('{"v1_3": "x"}')
    with pytest.raises(Fault, match="has nothing about question 'v1_0' of mm_vet"):
        MMVet(data=mm_vet).published(MMVet(data=mm_vet).questions())
    assert isinstance(LLaVABench(data=tmp_path), calibrate.Calibrated)
