"""The package in examples/extend works with everything, through the real command line."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir

from povid.benchmarks.__main__ import main as benchmarks_command
from povid.fault import Fault
from povid.method.distortions import generator
from povid.method.objectives import Terms
from povid.run.settings import build

ROOT = Path(__file__).resolve().parents[1]
EXTEND = ROOT / "examples" / "extend"
PYTHONPATH = os.pathsep.join([str(EXTEND), str(ROOT / "src")])
SEARCH = f"hydra.searchpath=[file://{EXTEND}/conf]"
sys.path.insert(0, str(EXTEND))


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    """The example's YAML files name its data from there."""
    monkeypatch.chdir(ROOT)


def short(outputs: Path) -> list[str]:
    """Two steps a stage, without evaluation's captions."""
    return [
        f"outputs={outputs}",
        "samples=0",
        "logger=none",
        *(f"stages.{number}.{setting}" for number in (1, 2) for setting in ("max_steps=2", "batch_size=4")),
    ]


def python(*arguments: str) -> str:
    """What a command prints, run as a user of the package runs it."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> Path:
    """A run with all five, of the README's command."""
    outputs = tmp_path_factory.mktemp("extend")
    python("train.py", "hydra.searchpath=[file://examples/extend/conf]", "experiment=extend", *short(outputs))
    return outputs


def only_run(outputs: Path) -> Path:
    (results,) = outputs.glob("runs/*/results.json")
    return results.parent


def metrics(run: Path, stage: int) -> list[dict[str, float]]:
    with (run / f"stage_{stage}" / "metrics.csv").open(newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_a_run_trains_evaluates_and_reports_with_all_five(outputs):
    run = only_run(outputs)
    results = json.loads((run / "results.json").read_text())
    assert (results["objective"], results["data"]) == ("hinge", "csv_pairs")
    assert results["noise"]["_target_"] == "mine.tiles.Tiles"

    # The format: every row of the table is a record of both stages.
    records = len(rows(EXTEND / "data" / "preferences.csv"))
    assert {stage["records"] for stage in results["stages"].values()} == {records}

    # The objective: a stage begins at its reference, so the rewards are 0, the hinge is 1, and the second step differs.
    for number, rewards in (
        (1, ("chosen", "rejected")),
        (2, ("chosen", "rejected", "rejected_noise", "rejected_text")),
    ):
        first, second = metrics(run, number)
        found = [key for key in first if key.startswith("weighted_rewards/")]
        assert found == [f"weighted_rewards/{name}" for name in rewards]
        assert first["loss"] == pytest.approx(1, abs=1e-5)
        assert second["loss"] != pytest.approx(1, abs=1e-3)
        # The callback: beside the loss, once a step, and before clipping at 1.
        assert first["gradient_norm"] > 1 and second["gradient_norm"] > 0

    # The benchmark: its figure is that of the answers, again by the command that scores anybody's.
    decided = json.loads((run / "benchmarks" / "exact_match" / "scores.json").read_text())["records"]
    assert len(decided) == len(json.loads((EXTEND / "data" / "questions.json").read_text()))
    accuracy = 100 * sum(record["correct"] for record in decided) / len(decided)
    assert results["benchmarks"]["exact_match"]["accuracy"] == pytest.approx(accuracy)
    answers, again = run / "benchmarks" / "exact_match" / "official" / "answers.jsonl", outputs / "again.json"
    command = ["mine.exact_match.ExactMatch", "--data", str(EXTEND / "data"), "--answers", str(answers)]
    assert benchmarks_command([*command, "--json", str(again)]) == 0
    assert json.loads(again.read_text())["scores"]["accuracy"] == pytest.approx(accuracy)

    # The report: its column stands in Table 3.
    python("-m", "povid.report", str(outputs))
    table = (outputs / "tables" / "table3.md").read_text()
    heading = next(line for line in table.splitlines() if line.startswith("| Text disprefer"))
    ours = next(line for line in table.splitlines() if "both, n = 1" in line)
    assert "Exact match" in heading.split("|")[-2]
    assert ours.split("|")[-2].strip() == f"{accuracy:.1f}"


def test_the_processes_of_a_sweep_over_two_devices_find_the_package_too(outputs, tmp_path, monkeypatch):
    """Two processes with batches of 2 take the steps of one process with batches of 4."""
    two = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true")
    monkeypatch.setenv("PYTHONPATH", PYTHONPATH)
    status, printed = forks.train(
        "-m",
        SEARCH,
        "experiment=extend",
        *short(tmp_path),
        *two,
        "ablation=text",
        "benchmarks=[]",
        "stages.1.batch_size=2",
        f"hydra.sweep.dir={tmp_path}/sweep",
        log=tmp_path / "log",
    )
    assert status == 0, printed
    one, (both,) = only_run(outputs), tmp_path.glob("sweep/0_text_seed0")
    for alone, shared in zip(metrics(one, 1), metrics(both, 1), strict=True):
        assert alone == pytest.approx(shared, rel=1e-3, abs=1e-5)


def test_the_tiles_are_what_stage_2_trains_on(outputs, tmp_path):
    """With one tile, which is the whole picture, stage 1 stays as it was and the noise term of stage 2 does not."""
    status, printed = forks.train(SEARCH, "experiment=extend", "noise.side=1", *short(tmp_path), log=tmp_path / "log")
    assert status == 0, printed
    mixed, whole = only_run(outputs), only_run(tmp_path)
    assert metrics(mixed, 1) == metrics(whole, 1)
    noise = "weighted_rewards/rejected_noise"
    assert metrics(mixed, 2)[1][noise] != metrics(whole, 2)[1][noise]


def test_tiles_change_places_and_nothing_else():
    """A picture of 7 x 10 pixels, 3 tiles a side: tiles of 2 x 3, a row and a column of pixels left over."""
    from mine.tiles import Tiles

    x = torch.arange(70.0).reshape(1, 7, 10).expand(3, -1, -1)
    orders = set()
    for record in range(20):
        mixed = Tiles(side=3)(x, generator(seed=0, epoch=0, record=record))
        assert mixed[:, 6:].equal(x[:, 6:]) and mixed[:, :, 9:].equal(x[:, :, 9:])
        corners = [int(mixed[0, 2 * i, 3 * j]) for i in range(3) for j in range(3)]
        assert sorted(corners) == [20 * i + 3 * j for i in range(3) for j in range(3)]
        for place, corner in enumerate(corners):
            (i, j), (top, left) = divmod(place, 3), divmod(corner, 10)
            assert mixed[:, 2 * i : 2 * i + 2, 3 * j : 3 * j + 3].equal(x[:, top : top + 2, left : left + 3])
        orders.add(tuple(corners))
    assert len(orders) > 15
    assert Tiles(side=1)(x, generator(seed=0, epoch=0, record=0)).equal(x)


def test_the_hinge():
    """alpha 0.5, log-ratios (4, 1) of y_w, (2, 0) of y_l^t and (-2, 4) of y_l^n.

    Stage 1: rewards (2, 0.5) and (1, 0), margins (1, 0.5), losses (0, 0.5). Stage 2: the dispreferred rewards are
    halved, (0.5, 0) and (-0.5, 1), so margins are (2, -0.5) and losses (0, 1.5).
    """
    from mine.hinge import Hinge

    reference = Terms(*[torch.tensor([-7.0, -9.0])] * 3)
    shift = {"preferred": [4.0, 1.0], "text": [2.0, 0.0], "noise": [-2.0, 4.0]}
    policy = Terms(**{name: getattr(reference, name) + torch.tensor(by) for name, by in shift.items()})
    objective = Hinge(alpha=0.5)
    for terms, losses in (({"preferred", "text"}, [0.0, 0.5]), ({"preferred", "text", "noise"}, [0.0, 1.5])):
        some = [Terms(**{name: getattr(each, name) for name in terms}) for each in (policy, reference)]
        assert objective(*some, Terms()).loss_B.tolist() == losses


def test_the_table_names_the_row_and_the_column_at_fault(tmp_path):
    from mine.csv_pairs import read

    pictures = EXTEND / "data" / "pictures"
    table = tmp_path / "table.csv"
    table.write_text(
        "image,question,preferred,dispreferred\n"
        'red_circle.png,"What color, please?",Red,Blue\n'
        "red_circle.png,What color?,,Blue\n"
        "nowhere.png,What color?,Red,Blue\n"
    )
    with pytest.raises(Fault, match=r"table\.csv, row 1: .*'preferred' is missing"):
        read(table, pictures)
    skipped: list[str] = []
    (triple,) = read(table, pictures, skipped)
    assert (triple.question, triple.preferred[1].text, triple.image) == (
        "What color, please?",
        "Red",
        pictures / "red_circle.png",
    )
    assert len(skipped) == 2 and "nowhere.png" in skipped[1]


def test_an_answer_matches_but_for_case_spaces_and_full_stop():
    from mine.exact_match import ExactMatch

    benchmark = ExactMatch(data=EXTEND / "data")
    question = benchmark.questions()[0]
    assert question.meta["answer"] == "Yes"
    for answer, right in ((" yes.", True), ("YES", True), ("Yes, a circle", False), ("", False)):
        assert benchmark.score([question], [answer]).records[0]["correct"] is right, answer


def test_arguments_that_the_examples_do_not_take_are_answered_with_the_nearest_one(tmp_path):
    """Every YAML of a copy of the package's conf/ has a key misspelled; all are reported at once."""
    conf = shutil.copytree(EXTEND / "conf", tmp_path / "conf")
    for file, spelled, misspelled in (
        ("objective/hinge.yaml", "alpha:", "alhpa:"),
        ("noise/tiles.yaml", "side:", "sides:"),
        ("data/csv_pairs.yaml", "_partial_: true}", "_partial_: true, image: x}"),
        ("benchmarks/exact_match.yaml", "max_new_tokens:", "max_new_token:"),
        ("callbacks/gradient_norm.yaml", "order:", "oder:"),
    ):
        text = (conf / file).read_text()
        assert spelled in text
        (conf / file).write_text(text.replace(spelled, misspelled))
    status, printed = forks.train(
        f"hydra.searchpath=[file://{conf}]", "experiment=extend", *short(tmp_path), log=tmp_path / "log"
    )
    assert status == 2
    for sentence in (
        "objective.alhpa: mine.hinge.Hinge takes no such argument; did you mean 'alpha'?",
        "noise.sides: mine.tiles.Tiles takes no such argument; did you mean 'side'?",
        "data.format.image: mine.csv_pairs.read takes no such argument; did you mean 'images'?",
        "benchmarks.exact_match.max_new_token: mine.exact_match.ExactMatch takes no such argument; "
        "did you mean 'max_new_tokens'?",
        "callbacks.gradient_norm.oder: mine.gradient_norm.GradientNorm takes no such argument; did you mean 'order'?",
    ):
        assert sentence in printed, f"{sentence!r} is missing in:\n{printed}"
    assert "the configuration has 5 problems" in printed
    assert "Traceback" not in printed


def blocks(language: str) -> list[str]:
    """The README's fenced blocks of a language."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", (EXTEND / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    return [block for of, block in found if of == language]


def contains(whole: dict[str, Any], part: dict[str, Any]) -> bool:
    """Whether every setting of ``part`` has its value in ``whole``."""
    return all(
        contains(whole[key], value) if isinstance(value, dict) else whole[key] == value for key, value in part.items()
    )


def test_the_commands_of_the_recipes_compose_and_bind():
    commands = [line for block in blocks("") for line in block.splitlines() if line.startswith("python train.py")]
    assert len(commands) >= 8
    for command in commands:
        overrides = [
            argument.replace("file://examples", f"file://{ROOT}/examples")
            for argument in shlex.split(command, comments=True)[2:]
        ]
        if "model=my_model" in overrides:  # the next test's
            continue
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            build(compose("config", overrides=overrides))


def test_the_yaml_files_of_the_recipes_compose_and_bind(tmp_path):
    """Those that are in the package say what its files say; the others are written into a folder of one's own."""
    choices = []
    for block in blocks("yaml"):
        place = block.splitlines()[0].removeprefix("# ")
        if (EXTEND / place).exists():
            assert contains(yaml.safe_load((EXTEND / place).read_text()), yaml.safe_load(block)), place
            continue
        file = tmp_path / place
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(block)
        choices.append(f"{file.parent.name}={file.stem}")
    assert choices == ["model=my_model"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        settings = build(compose("config", overrides=[f"hydra.searchpath=[file://{tmp_path}/conf]", *choices]))
    assert settings.model.architecture_for("unheard_of").packable
