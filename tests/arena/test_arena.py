"""The arena: what is run, which setting is chosen, what is averaged, and what survives a kill."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml
from hydra import compose, initialize_config_dir

from povid.arena import __main__ as command
from povid.arena import pool, result
from povid.arena.plan import BASE, Plan, choose, contests, read_plan, trials
from povid.arena.result import MATCHED, Sums
from povid.fault import Fault
from povid.machine import conf_folder
from povid.run.settings import build

PLAN = {
    "common": "logger=none",
    "base": "ablation=none",
    "reference": "one",
    "arms": {"methods": {"one": "objective=paper", "two": "objective=ipo"}, "controls": {"three": "ablation=text"}},
    "tuning": {
        "grid": ["stages.1.lr=1e-4", "stages.1.lr=2e-4", "stages.1.lr=3e-4"],
        "overrides": "data.split=tuning",
        "world": 0,
        "seed": 0,
        "choice": {"score": "chair.CHAIR_I", "better": "low", "guard": "chair.coverage", "within": 5.0},
    },
    "evaluation": {"overrides": "data.split=evaluation", "worlds": [1, 2], "seeds": [0, 1, 2]},
}

# Stands in for train.py: notes that it ran, and writes what a run writes, with scores that follow from its overrides.
STUB = """
import json, os, pathlib, sys, time
told = dict(argument.split("=", 1) for argument in sys.argv[1:])
folder = pathlib.Path(told["hydra.run.dir"].strip("'"))
with open(os.environ["NOTES"], "a") as notes:
    notes.write(folder.parent.name + " " + folder.name.rpartition("_")[0] + " " + os.environ["OMP_NUM_THREADS"] + "\\n")
if told["row"] == os.environ.get("BREAKS"):
    sys.exit("error: the disk is full")
time.sleep(float(os.environ.get("TAKES", 0)))
pictures, lr = range(20), float(told.get("stages.1.lr", 0)) * 1e4
world, seed = int(told["data.prepare.seed"]), int(told["seed"])
wrong = {"base": 6, "one": 3, "two": 2, "three": 4}[told["row"]] + (lr == 2) * (told["row"] != "two")
def caption(i):
    hit = (i + world + seed) % 10 < wrong
    sums = {"CHAIR_S": [hit, 1], "CHAIR_I": [hit, 2 + hit], "coverage": [2, 2], "repeat_rate": [0, 2 + hit]}
    return {"paired": {"picture": i, "sums": sums, "mentions": "hnn" if hit else "nn"}}
def answer(i, group):
    sums = {"f1": [2, 2], "f1_valid": [2, 2], "invalid": [0, 1], "yes_ratio": [1, 1]}
    return {"paired": {"picture": i, "sums": sums, "group": group}}
records = {"chair": [caption(i) for i in pictures], "pope": [answer(i, g) for g in "ab" for i in pictures]}
for name, entries in records.items():
    place = folder / "benchmarks" / name
    place.mkdir(parents=True, exist_ok=True)
    (place / "scores.json").write_text(json.dumps({"scores": {}, "records": entries}))
    asked = {"texts": "t", "pictures": f"p{world}", "truth": "g"}
    (place / "asked.json").write_text(json.dumps(asked))
row = {"objective": told["row"], "stages.1.lr": lr, "pictures": f"p{world}", "versions.povid": os.environ["VERSION"]}
named = {"settings": {"data.prepare.seed": str(world)}, "places": {}}
scores = {"chair": {"CHAIR_I": 10.0 * wrong, "coverage": 90.0 - 4 * lr}, "pope": {"f1": 90.0}}
(folder / "results.json").write_text(json.dumps({
    "row": told["row"], "ablation": "none" if told["row"] == "base" else "text", "stage": "all", "seed": seed,
    "model": "m", "data": "d", "benchmarks": scores, "adapters": [], "started": f"{world}{seed}",
    "stages": {} if told["row"] == "base" else {"1": {"steps": 75, "batch_size": 32}},
    "identity": {"row": row, "named": named},
}))
"""


@pytest.fixture
def arena(tmp_path, monkeypatch):
    """arena(*options, **environment) → (exit status, output, the jobs that were started)."""
    stub, plan, notes = tmp_path / "stub.py", tmp_path / "plan.yaml", tmp_path / "notes"
    stub.write_text(STUB)
    plan.write_text(yaml.safe_dump(PLAN, sort_keys=False))
    monkeypatch.setattr(pool, "TRAIN", (sys.executable, str(stub)))
    monkeypatch.setenv("NOTES", str(notes))
    monkeypatch.setenv("VERSION", "1")

    def run(*options: str, change=None, **environment: str):
        notes.write_text("")
        plan.write_text(yaml.safe_dump(PLAN | (change or {}), sort_keys=False))
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            status = command.main([str(plan), "--out", str(tmp_path / "out"), "--resamples", "200", *options])
        return status, [line.split() for line in notes.read_text().splitlines()]

    return run


def test_from_trials_to_the_table(arena, tmp_path, capsys):
    """Trial 2 is worse for one and three, whose other trials tie, and trial 3 costs two; all lose coverage with the
    rate: 4, 8 and 12 points, of which the rule allows 5. So every arm takes trial 1."""
    status, started = arena("--jobs", "2")
    assert status == 0
    labels = [f"{arm} {label}" for arm, label, _ in started]
    assert len(labels) == len(set(labels)) == (1 + 3 * 3) + (2 + 3 * 6)
    assert {label for label in labels if label.startswith("base ")} == {
        "base base",
        "base world1_seed0",
        "base world2_seed0",
    }
    chosen = json.loads((tmp_path / "out" / "chosen.json").read_text())["arms"]
    assert {arm: one["chosen"] for arm, one in chosen.items()} == dict.fromkeys(chosen, "stages.1.lr=1e-4")
    assert [trial["guard"] for trial in chosen["two"]["trials"]] == [86, 82, 78]

    found = json.loads((tmp_path / "out" / "arena.json").read_text())["standings"]
    assert [one["arm"] for one in found] == ["base", "one", "two", "three"]
    assert [one["runs"] for one in found] == [2, 6, 6, 6]
    chair = {one["arm"]: one["figures"]["CHAIR_S"] for one in found}
    assert [chair[arm]["value"] for arm in chair] == pytest.approx([60, 30, 20, 40])
    assert all(one["low"] < one["value"] < one["high"] for one in chair.values())
    two = found[2]["minus one"]
    assert two["CHAIR_S"]["value"] == pytest.approx(-10) and two["coverage"] == {"value": 0, "low": 0, "high": 0}
    assert two[MATCHED]["high"] < 0  # captions with a hallucination are cut nowhere: the same coverage
    table = (tmp_path / "out" / "arena.md").read_text()
    assert re.search(r"\| two \| stages.1.lr=1e-4 \| 75 \| 20\.0 \|.*\*\*−", table)
    assert not re.search(r"\| three .*\*\*", table)
    assert (tmp_path / "out" / "arena.png").stat().st_size > 10_000
    assert "tuning: 10 runs, 0 of them done" in capsys.readouterr().out

    status, started = arena()
    assert status == 0 and started == []


def test_a_failed_job_is_named_and_alone_is_run_again(arena, capsys):
    status, started = arena("--jobs", "3", BREAKS="two")
    error = capsys.readouterr().err
    assert status == 2 and "3 of 10 jobs failed (first: two trial" in error and "the disk is full" in error
    assert {arm for arm, _, _ in started} == {"base", "one", "two", "three"}  # the others went on
    assert all("world" not in label for _, label, _ in started)
    status, started = arena("--dry-run")
    assert status == 0 and started == []
    assert capsys.readouterr().out.count("resume=true") == 3
    status, started = arena()
    assert status == 0 and sum(label.startswith("trial") for _, label, _ in started) == 3


def test_results_of_another_plan_or_version_are_not_mixed(arena, tmp_path, capsys):
    assert arena()[0] == 0
    change = {"arms": PLAN["arms"] | {"controls": {"three": "ablation=text stages.1.epochs=5"}}}
    status, started = arena(change=change)
    assert status == 0 and {arm for arm, _, _ in started} == {"three"}
    (one,) = (tmp_path / "out" / "evaluation" / "two").glob("world1_seed0_*/results.json")
    one.unlink()
    assert arena(VERSION="2")[0] == 2
    error = capsys.readouterr().err
    assert "the arms were run with different versions.povid (1 in" in error and "2 in" in error

    content = json.loads(one.read_text())
    content["identity"]["row"] |= {"versions.povid": "1", "stages.1.lr": 7}
    one.write_text(json.dumps(content))
    assert arena()[0] == 2
    error = capsys.readouterr().err
    assert "the runs of two differ in more than world and seed (" in error and "stages.1.lr=7" in error

    note = one.parent / "benchmarks" / "pope" / "asked.json"
    content["identity"]["row"]["stages.1.lr"] = 1.0
    one.write_text(json.dumps(content))
    note.write_text('{"texts": "u", "pictures": "p1", "truth": "g"}')
    assert arena()[0] == 2
    assert "answers to other questions than other arms in world 1" in capsys.readouterr().err


def test_a_killed_arena_stops_its_runs_and_continues(arena, tmp_path):
    """SIGTERM while two runs go on: both end, and nothing else is started."""
    code = (
        "import sys; from povid.arena import __main__ as command, pool; "
        f"pool.TRAIN = (sys.executable, {str(tmp_path / 'stub.py')!r}); sys.exit(command.main(sys.argv[1:]))"
    )
    arguments = [str(tmp_path / "plan.yaml"), "--out", str(tmp_path / "out"), "--jobs", "2"]
    notes = tmp_path / "notes"
    notes.write_text("")
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], env=os.environ | {"TAKES": "60"})
    deadline = time.monotonic() + 60
    while len(notes.read_text().splitlines()) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    assert len(notes.read_text().splitlines()) == 2
    assert not list((tmp_path / "out").rglob("results.json"))


def test_the_rule(tmp_path):
    """The best score among the trials near the base's guard; if there is none, the one that keeps most of it."""
    plan = Plan.model_validate(PLAN)
    tried = trials(plan, tmp_path)

    def chosen(*scores: tuple[float, float]) -> int:
        for arm in plan.names:
            for job, (chair, coverage) in zip(tried[arm], scores):
                job.folder.mkdir(parents=True, exist_ok=True)
                scored = {"benchmarks": {"chair": {"CHAIR_I": chair, "coverage": coverage}}}
                (job.folder / "results.json").write_text(json.dumps(scored))
        (base,) = tried[BASE]
        base.folder.mkdir(parents=True, exist_ok=True)
        (base.folder / "results.json").write_text('{"benchmarks": {"chair": {"CHAIR_I": 30, "coverage": 80}}}')
        return choose(plan, tried)[0]["one"]

    assert chosen((9, 80), (8, 75), (1, 74.9)) == 1
    assert chosen((9, 60), (8, 74), (1, 70)) == 1
    assert chosen((8, 79), (8, 80), (9, 80)) == 0
    with pytest.raises(Fault, match=r"holds no chair.CHAIR_I, by which settings are chosen"):
        chosen((9, 80), (float("nan"), 75), (1, 74.9))


def test_differences_are_of_pairs():
    """Pictures and worlds vary far more than the arms differ: b has one hallucination less in every tenth picture."""
    rng = np.random.default_rng(3)

    def sums(wrong: np.ndarray) -> Sums:
        said = np.full(wrong.shape, 10.0)
        zero = {title: np.ones((1, 2, len(wrong))) for title in result.FIGURES}
        curve = np.zeros((3, 2, len(wrong)))
        curve[:, 1] = wrong, said, np.ones(len(wrong))
        return Sums(zero | {"CHAIR_I": np.stack([wrong, said])[None]}, curve, np.ones(len(wrong)))

    a = [[rng.poisson(3 + world, 100) + 1.0 for _ in range(2)] for world in range(3)]
    less = (np.arange(100) % 10 == 0).astype(float)
    arms = {
        "a": [[sums(wrong) for wrong in runs] for runs in a],
        "b": [[sums(wrong - less) for wrong in runs] for runs in a],
    }
    values, differences = result._bootstrap(arms, "a", 400, 0)
    place = list(result.FIGURES).index("CHAIR_I")
    own, gap = result._interval(values["a"][:, place]), result._interval(differences["b"][:, place])
    assert own.value == pytest.approx(np.mean(a) * 10)
    assert own.high - own.low > 5 and gap.value == pytest.approx(-1)
    assert -2 < gap.low < gap.value < gap.high < 0
    assert differences["b"][:, -1] == pytest.approx(differences["b"][:, place])  # both reach all coverage there is


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"reference": "four"}, "reference is 'four', which is no arm; the arms are one, two, three"),
        ({"arms": {"x": {"one": "a=b"}, "y": {"one": "c=d"}}}, "one names more than one arm"),
        ({"arms": {"x": {"one": "seed=3"}}}, "seed is set by the arena"),
        ({"arms": {"x": {"one": "--multirun"}}}, "is not an override of train.py"),
        ({"common": None}, "common: found nothing, needed text"),
        ({"colour": 1}, "colour: there is no such setting"),
        ({"evaluation": PLAN["evaluation"] | {"seeds": [1, 1]}}, "needed numbers that differ"),
        (
            {"evaluation": PLAN["tuning"] and {"overrides": "data.split=tuning", "worlds": [0], "seeds": [0]}},
            "would be",
        ),
    ],
)
def test_a_plan_is_checked_before_anything_runs(arena, capsys, change, sentence):
    status, started = arena(change=change)
    error = capsys.readouterr().err
    assert status == 2 and started == [] and sentence in error and error.count("\n") == 1, error


def test_the_shipped_plan_composes_and_is_fair(tmp_path):
    """Every arm's settings bind, none looks at the evaluation's pictures while it tunes, and all have as many steps."""
    plan = read_plan(conf_folder() / "arena.yaml")
    tried, met = trials(plan, tmp_path), contests(plan, tmp_path, dict.fromkeys(plan.names, 0))
    folders = [job.folder for jobs in (*tried.values(), *met.values()) for job in jobs]
    assert len(set(folders)) == len(folders) == 1 + 3 * len(plan.names) + 3 + 9 * len(plan.names)
    epochs = set()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        for arm in (BASE, *plan.names):
            told = {tuple(word for word in job.overrides if "=" in word) for job in (tried[arm][-1], met[arm][-1])}
            assert {split for words in told for split in words if "split" in split} == {
                "data.split=tuning",
                "data.split=evaluation",
            }
            settings = build(compose("config", overrides=list(met[arm][-1].overrides)))
            assert settings.plain.row == arm and settings.data.benchmarks.endswith("/evaluation")
            epochs.add(sum(settings.stages[number].epochs for number in settings.run_stages))
    assert epochs == {0, 5}
    assert plan.tuning.world not in plan.evaluation.worlds


def test_the_plan_for_the_hallucinator_binds(tmp_path):
    plan = read_plan(conf_folder().parent / "examples" / "arena" / "hallucinator.yaml")
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        for arm in (BASE, *plan.names):
            settings = build(compose("config", overrides=list(trials(plan, tmp_path)[arm][-1].overrides)))
            assert settings.dispreference_name == ("given" if arm == BASE else "cooccurrence")
            assert settings.data.benchmarks.endswith("/tuning")


@pytest.mark.slow
def test_real_runs(tmp_path, capsys):
    """Two arms with the shipped base model and a few pictures; text alone is the first stage of both."""
    plan = {
        "common": "logger=none samples=0 data.prepare.preferences=12 stages.1.max_steps=2 stages.2.max_steps=1",
        "base": "ablation=none",
        "reference": "both",
        "arms": {"methods": {"both": "ablation=both", "text": "ablation=text"}},
        "tuning": PLAN["tuning"] | {"grid": ["stages.1.lr=1e-3"], "overrides": "data.split=tuning benchmarks=[chair]"},
        "evaluation": {"overrides": "data.split=evaluation", "worlds": [1, 2], "seeds": [3]},
    }
    plan["common"] += " data.prepare.tuning=4 data.prepare.evaluation=6"
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))
    out = tmp_path / "out"
    assert command.main([str(tmp_path / "plan.yaml"), "--out", str(out), "--resamples", "200"]) == 0, [
        log.read_text() for log in out.rglob("*.log")
    ]
    found = {one["arm"]: one for one in json.loads((out / "arena.json").read_text())["standings"]}
    assert [(arm, one["steps"], one["runs"]) for arm, one in found.items()] == [
        ("base", 0, 2),
        ("both", 3, 2),
        ("text", 2, 2),
    ]
    for arm, one in found.items():
        runs = [json.loads(file.read_text()) for file in (out / "evaluation" / arm).glob("*/results.json")]
        for figure, (benchmark, score) in {"CHAIR_I": ("chair", "CHAIR_I"), "POPE F1": ("pope", "f1")}.items():
            mean = np.mean([run["benchmarks"][benchmark][score] for run in runs])
            assert one["figures"][figure]["value"] == pytest.approx(mean)
    assert "differ in their numbers of optimization steps: 2, 3" in capsys.readouterr().out
