"""Which run folders are read, and which runs are averaged."""

from __future__ import annotations

import json
import math
import os
import shutil

import pytest

from povid.fault import Fault
from povid.report.curves import metrics
from povid.report.runs import find_runs, group, summarise
from povid.report.tables import table


def test_mean_and_spread_over_seeds(write, outputs):
    """CHAIR_S 71, 72 and 76: mean 219 / 3 = 73; squares 4 + 1 + 9 = 14, sd sqrt(14 / 2) = 2.6457513, se sd / sqrt 3 =
    1.5275252."""
    for seed, shift in enumerate((-1.0, 0.0, 4.0)):
        write("none", seed, shift)
    (row,) = group(find_runs(outputs))
    found = summarise(row, "chair.CHAIR_S")
    assert (found.mean, found.n) == (73.0, 3)
    assert found.sd == pytest.approx(2.6457513, abs=1e-7)
    assert found.se == pytest.approx(1.5275252, abs=1e-7)


def test_one_run_has_no_spread(write, outputs):
    write("none", 0)
    found = summarise(group(find_runs(outputs))[0], "chair.CHAIR_S")
    assert found.mean == 72.0 and math.isnan(found.sd) and math.isnan(found.se)


def test_runs_that_differ_in_more_than_the_seed_are_two_rows(write, outputs):
    noise = {"schedule": "sigmoid", "step": 500, "space": "normalized"}
    sampled = {"chair": {"max_new_tokens": 64, "temperature": 0.2}}
    for row, changes, shown in (
        ("text", {"objective": "released"}, "objective=released"),
        ("noise", {"noise": noise | {"schedule": "linear"}}, "noise.schedule=linear"),
        ("noise", {"noise": noise | {"step": 600}}, "noise.step=600"),
        ("text", {"stages": {"1": {"steps": 75}}}, "75 steps"),
        ("both", {"experiment": "table3"}, "experiment=table3"),
        ("text", {"decoding": sampled}, "decoding.chair.temperature=0.2"),
        ("both", {"stage": 1}, "stage 1 only"),
    ):
        shutil.rmtree(outputs, ignore_errors=True)
        write(row, 0)
        write(row, 1, folder="other", **changes)
        rows = group(find_runs(outputs))
        assert [len(found.runs) for found in rows] == [1, 1], changes
        assert any(shown in found.difference for found in rows), changes


def test_what_cannot_affect_a_row_does_not_split_it(write, outputs):
    for row, changes in (
        ("none", {"objective": "released", "experiment": "controls"}),
        ("text", {"noise": {"schedule": "linear", "step": 900, "space": "pixel"}}),
        ("text", {"stage": 1}),
        ("noise", {"stage": "2"}),
        ("both", {"timings": {"fit": 99.0}, "started": "2027", "versions": {}}),
    ):
        shutil.rmtree(outputs, ignore_errors=True)
        write(row, 0)
        write(row, 1, folder="other", **changes)
        (found,) = group(find_runs(outputs))
        assert len(found.runs) == 2 and not found.difference, changes


def test_the_command_line_distinguishes_runs_that_results_do_not(write, outputs):
    for seed, override in enumerate(("stages.1.lr=1e-3", "stages.1.lr=1e-4")):
        hydra = write("text", seed) / ".hydra"
        hydra.mkdir()
        (hydra / "overrides.yaml").write_text(f"- ablation=text\n- seed={seed}\n- {override}\n")
    assert [row.difference for row in group(find_runs(outputs))] == ["stages.1.lr=1e-3", "stages.1.lr=1e-4"]


def settings(lr=1e-3, alpha=0.1, stages=("1", "2")):
    return {
        "settings": {
            "objective": {"name": "paper", "alpha": alpha},
            "noise": {"schedule": "sigmoid", "step": 500},
            "stages": {number: {"name": "text", "lr": lr} for number in stages},
        },
        "stages": {number: {"steps": 25, "fingerprint": str(lr), "seconds": lr} for number in stages},
    }


def test_differences_are_named_as_on_the_command_line(write, outputs):
    write("both", 0, **settings(), adapters=["a/0"])
    write("both", 1, **settings(), adapters=["a/1"])
    write("both", 2, folder="a", **settings(lr=0.01), adapters=["b/2"])
    assert [(row.difference, len(row.runs), row.whole) for row in group(find_runs(outputs))] == [
        ("stages.1.lr=0.001, stages.2.lr=0.001", 2, True),
        ("stages.1.lr=0.01, stages.2.lr=0.01", 1, True),
    ]


def test_a_long_difference_becomes_a_number_with_a_remark(write, outputs):
    write("both", 0, **settings())
    write("both", 1, folder="a", experiment="released", objective="released", **settings(lr=0.01, alpha=0.2))
    first, second = group(find_runs(outputs))
    assert (first.label, second.label) == ("both (setting 1)", "both (setting 2)")
    assert second.remarks == [
        "setting 2 is experiment=released, objective=released, objective.alpha=0.2, stages.1.lr=0.01, stages.2.lr=0.01"
    ]
    assert "experiment=default" in first.remarks[0]


def test_a_second_stage_alone_is_a_row_of_its_own_but_a_whole_one(write, outputs):
    write("both", 0, **settings())
    write("both", 1, stage=2, **settings(stages=("2",)))
    rows = group(find_runs(outputs))
    assert [(row.difference, row.whole) for row in rows] == [("", True), ("stage 1 of another run", True)]


def test_runs_with_fewer_benchmarks_join_the_others(write, outputs):
    greedy = {"temperature": 0.0}
    write("none", 0, decoding={"chair": greedy, "pope": greedy})
    write("none", 1, decoding={"chair": greedy})
    (row,) = group(find_runs(outputs))
    assert summarise(row, "chair.CHAIR_S").n == 2
    write("none", 2, decoding={"chair": {"temperature": 0.2}})
    assert [row.difference for row in group(find_runs(outputs))] == [
        "decoding.chair.temperature=0.0",
        "decoding.chair.temperature=0.2",
    ]


def test_overrides_that_change_nothing_do_not_split(write, outputs):
    for seed, more in enumerate(
        (
            "logger=csv",
            "generation.batch_size=8",
            "logger.mode=offline",
            "hydra.job.num=3",
            "stages@stages.2=image",
            "init_from=elsewhere",
            "noise.step=300",
        )
    ):
        hydra = write("text", seed) / ".hydra"
        hydra.mkdir()
        (hydra / "overrides.yaml").write_text(f"- seed={seed}\n- {more}\n")
    assert [len(row.runs) for row in group(find_runs(outputs))] == [7]


def test_a_seed_run_twice_counts_once_by_its_newest_run(write, outputs):
    columns = [COLUMN | {"key": "chair.CHAIR_S"}]
    write("text", 0, started="2026-01-01", folder="old", columns=columns)
    write("text", 0, 3.0, started="2026-02-01", folder="new", columns=columns)
    (row,) = group(find_runs(outputs))
    assert summarise(row, "chair.CHAIR_S").mean == 53.0
    remark = "1 older run with the same seed and settings not counted"
    assert row.remarks == [f"{remark}, although their scores differ"]
    write("text", 0, started="2026-02-01", folder="new", columns=columns)
    assert group(find_runs(outputs))[0].remarks == [remark]


def test_what_is_no_file_is_not_waited_for(write, outputs, capsys):
    """A pipe that nobody writes to, in place of a run's results and of its metrics."""
    write("text", 0)
    (outputs / "pipe" / "stage_1").mkdir(parents=True)
    for name in ("results.json", "stage_1/metrics.csv"):
        os.mkfifo(outputs / "pipe" / name)
    assert len(find_runs(outputs)) == 1
    assert "it is not a file" in capsys.readouterr().err
    series, problem = metrics(outputs / "pipe" / "stage_1")
    assert not series and "metrics.csv is not a file" in problem


COLUMN = {"key": "mine.score", "title": "Mine", "better": "high", "decimals": 1, "subscript": ""}


def test_unreadable_results_are_skipped_with_a_warning(write, outputs, capsys):
    write("none", 0)
    for name, text in (
        ("half", '{"row": "text", "bench'),
        ("list", "[]"),
        ("early", '{"row": "text"}'),
        ("nameless", '{"benchmarks": {}}'),
        ("binary", "\x00"),
        ("deep", "[" * 100_000),
        ("key", json.dumps({"row": "text", "benchmarks": {}, "columns": [COLUMN | {"key": 3}]})),
        ("columns", '{"row": "text", "benchmarks": {}, "columns": [{"key": "a.b"}]}'),
        ("better", json.dumps({"row": "text", "benchmarks": {}, "columns": [COLUMN | {"better": "up"}]})),
    ):
        (outputs / name).mkdir()
        (outputs / name / "results.json").write_text(text)
    (outputs / "folder" / "results.json").mkdir(parents=True)
    assert [run.row for run in find_runs(outputs)] == ["none"]
    printed = capsys.readouterr().err
    assert printed.count("warning: skipped ") == 10
    assert "half/results.json: it is not valid JSON" in printed
    assert "columns/results.json: 'columns' is not a list of table columns" in printed
    assert "'better' is low, high or null" in printed


def test_no_run_is_a_fault(outputs, tmp_path):
    with pytest.raises(Fault, match="is not a folder"):
        find_runs(outputs)
    outputs.mkdir()
    with pytest.raises(Fault, match="holds no results.json"):
        find_runs(outputs)
    (outputs / "results.json").write_text("{")
    with pytest.raises(Fault, match="1 results.json, none of them readable"):
        find_runs(outputs)


def test_a_run_reached_by_a_link_counts_once(write, outputs):
    folder = write("none", 0)
    (outputs / "latest").mkdir()
    (outputs / "latest" / "results.json").symlink_to(folder / "results.json")
    assert len(find_runs(outputs)) == 1


def test_missing_scores_keep_their_reason_and_cure(write, outputs):
    write("none", 0)
    (row,) = group(find_runs(outputs))
    assert summarise(row, "mmhal.score").reason == "mmhal: no judge is set; export POVID_JUDGE_MODEL=..."
    assert summarise(row, "mm_vet.total").reason == "mm_vet was not selected; add it to benchmarks="


def test_only_finite_numbers_are_scores(write, outputs):
    for value in (None, float("nan"), True, "72", 10**400, 1e308):
        write("none", 0, benchmarks={"chair": {"CHAIR_S": value}})
        summary = summarise(group(find_runs(outputs))[0], "chair.CHAIR_S")
        assert summary.mean is None and "CHAIR_S" in summary.reason, value


def test_a_score_missing_for_some_seeds_says_how_many_have_it(write, outputs):
    write("none", 0)
    write("none", 1, benchmarks={"chair": {"missing": "no synonyms.txt"}})
    found = summarise(group(find_runs(outputs))[0], "chair.CHAIR_S")
    assert (found.mean, found.n) == (72.0, 1)
    assert found.remark == "chair: 1 of 2 runs (chair: no synonyms.txt)"


def test_scores_of_two_judges_or_of_two_sizes_are_not_averaged(write, outputs):
    """Whatever the benchmark is called, and at any depth of its scores, but not in what is corrected."""
    for seed, (judge, size) in enumerate((("gpt-4-0314", 300), ("gpt-4o", 30))):
        benchmarks = {
            "mine": {"score": 2.0, "judge": judge},
            "chair": {"CHAIR_S": 50.0, "captions": size},
            "pope": {"f1": 80.0, "random": {"questions": size}},
            "mme": {"total": 9.0, "corrected": {"questions": size}},
        }
        write("none", seed, benchmarks=benchmarks)
    (row,) = group(find_runs(outputs))
    for score, reason in (
        ("mine.score", "mine: runs differ in judge gpt-4-0314 and gpt-4o and are not averaged"),
        ("chair.CHAIR_S", "chair: runs differ in captions 30 and 300 and are not averaged"),
        ("pope.f1", "pope: runs differ in random questions 30 and 300 and are not averaged"),
    ):
        assert (summarise(row, score).mean, summarise(row, score).reason) == (None, reason)
    assert summarise(row, "mme.total").mean == 9.0


def test_mixed_versions_are_remarked(write, outputs):
    write("none", 0)
    write("none", 1, versions={"torch": "2.12.0"})
    assert group(find_runs(outputs))[0].remarks == [
        "its runs were made with different versions: torch 2.12.0 and 2.13.0"
    ]


def identified(row="text", data=None, places=None, **parts) -> dict:
    """What a run of today writes about itself: the parts that do not come from the seed, and names for labels."""
    stages = {} if row == "none" else {"1": {"steps": 25, "batch_size": 4}}
    common = {"model.lora.r": 16, "weights": "w", "benchmarks.chair.prompt": "Describe.", "benchmarks.chair.truth": "t"}
    trained = {} if row == "none" else {"stages.1.lr": 1e-3, "records": "a", "trainer.precision": "32-true"}
    named = {"settings": {"data.split": "evaluation", **(data or {})}, "places": places or {}}
    return {"stages": stages, "identity": {"row": common | trained | parts, "named": named}}


def test_runs_are_one_row_where_their_identities_without_seed_agree(write, outputs):
    """And are named by what differs: by settings that are parts, else by those that the content comes from."""
    for changes, shown in (
        ({"model.lora.r": 8}, ["model.lora.r=16", "model.lora.r=8"]),
        ({"trainer.precision": "bf16-true"}, ["trainer.precision=32-true", "trainer.precision=bf16-true"]),
        ({"benchmarks.chair.prompt": "What?"}, ["benchmarks.chair.prompt=Describe.", "benchmarks.chair.prompt=What?"]),
        (
            {"benchmarks.chair.truth": "u", "data": {"data.split": "tuning"}},
            ["data.split=evaluation", "data.split=tuning"],
        ),
        (
            {"records": "b", "data": {"data.prepare.partner": 0.5}},
            ["data.prepare.partner=0.5", "data.prepare.partner=default"],
        ),
        (
            {"records": "b", "places": {"data.preferences": "b.json"}},
            ["data.preferences=b.json", "data.preferences=default"],
        ),
        ({"records": "b"}, ["records=a", "records=b"]),
        ({"records": "b", "stages.1.lr": 0.01}, ["stages.1.lr=0.001", "stages.1.lr=0.01"]),
        ({"experiment": None}, [""]),
    ):
        shutil.rmtree(outputs, ignore_errors=True)
        write("text", 0, **identified())
        write("text", 1, **identified())
        recorded = identified(**{k: v for k, v in changes.items() if k != "experiment"})
        folder = write("text", 2, folder="other", experiment="mine", **recorded)
        (folder / ".hydra").mkdir()
        (folder / ".hydra" / "overrides.yaml").write_text(
            "- stages.1.lr=7\n- +nothing=1\n"
        )  # nothing is guessed from it
        rows = group(find_runs(outputs))
        assert [row.difference for row in rows] == shown, changes
        assert sorted(len(row.runs) for row in rows) == ([3] if shown == [""] else [1, 2])


def test_worlds_are_averaged_where_every_row_was_run_in_the_same_ones(write, outputs):
    """Two rows in two worlds of two seeds: CHAIR_S of none 72 and 73 in world 0, 74 and 75 in world 1, mean 73.5."""

    def run(row, world, seed, **more):
        digests = {"benchmarks.chair.truth": f"t{world}"} | ({} if row == "none" else {"records": f"a{world}"})
        recorded = identified(row, **(digests | more), data={"data.prepare.seed": world})
        return write(row, seed, 2 * world + seed, folder=f"{row}/{world}/{seed}", **recorded)

    for row in ("none", "text"):
        for world in (0, 1):
            for seed in (0, 1):
                run(row, world, seed)
    none, text = group(find_runs(outputs))
    assert (len(none.runs), summarise(none, "chair.CHAIR_S").mean, none.label) == (4, 73.5, "none")
    assert none.remarks == text.remarks
    assert none.remarks == ["mean and spread over seeds and over 2 worlds (data.prepare.seed=0, 1)"]
    (block,) = (block for block in table(3, find_runs(outputs)).blocks if "over worlds, each" in block.title)
    difference = block.lines[0].cells["chair.CHAIR_S"].summary
    assert (difference.mean, difference.se) == (-22, 0)  # the worlds differ by two points, the rows alike in both

    run("text", 1, 1, **{"model.lora.r": 8})  # a row of its own, in one world
    rows = group(find_runs(outputs))
    assert [len(row.runs) for row in rows] == [2, 2, 2, 1, 1] and not any("worlds" in str(row.remarks) for row in rows)
    assert {row.label for row in rows if row.name == "none"} == {
        "none (data.prepare.seed=0)",
        "none (data.prepare.seed=1)",
    }

    run("text", 1, 1, records="edited")  # two contents of one world
    assert sorted(len(row.runs) for row in group(find_runs(outputs))) == [1, 1, 2, 2, 2]


def test_a_third_run_without_a_benchmark_hides_no_disagreement(write, outputs):
    write("none", 0, **identified("none"))
    write("none", 1, **identified("none", **{"benchmarks.chair.prompt": "What?"}))
    fewer = identified("none")
    for key in ("benchmarks.chair.prompt", "benchmarks.chair.truth"):
        del fewer["identity"]["row"][key]
    write("none", 2, **fewer)
    assert sorted(len(row.runs) for row in group(find_runs(outputs))) == [1, 1, 1]
    write("none", 1, **identified("none"))
    assert [len(row.runs) for row in group(find_runs(outputs))] == [3]


def test_an_identity_that_no_run_wrote_is_skipped(write, outputs, capsys):
    write("none", 0, **identified("none"))
    write("none", 1, folder="odd", identity={"row": 3})
    assert len(find_runs(outputs)) == 1
    assert "odd/results.json: 'identity' is not what a run writes" in capsys.readouterr().err
