"""What a user can get wrong: one sentence with the file, record or key and the fix, exit status 2, no traceback.

``train.py`` runs in forks of the test's process, which have imported everything already.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from forks import finish, outcome, settings, train

from povid.run import experiment
from povid.training.module import POVIDModule


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A tiny model, and files of the painted world to damage."""
    from povid.scenes.world import prepare

    folder = tmp_path_factory.mktemp("bad")
    tiny.save_tiny_llava(folder / "tiny")
    prepare(folder / "sound", seed=0, preferences=9, tuning=1, evaluation=1)
    return folder


@pytest.fixture
def data(world, tmp_path) -> Path:
    shutil.copytree(world / "sound", tmp_path / "data")
    return tmp_path / "data"


def on(data: Path) -> list[str]:
    return [f"data.folder={data}", "data.prepare=null"]


def change(data: Path, edit: Callable[[list], object]) -> None:
    file = data / "preferences.json"
    records = json.loads(file.read_text())
    file.write_text(json.dumps(edit(records) or records))


def refused(world: Path, tmp_path: Path, *arguments: str) -> str:
    status, printed = train(*settings(world, f"hydra.run.dir={tmp_path}/run", *arguments), log=tmp_path / "log")
    assert status == 2, printed
    assert "Traceback" not in printed
    sentences = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(sentences) == 1, printed
    return printed[printed.index("error: ") :]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["ablation=txt"], "Could not find 'ablation/txt' Available options in 'ablation': both noise none text"),
        (["stage=3"], "stage: found 3, needed 1, 2 or all"),
        (["objective.alpha=1"], "objective.alpha has moved; use objective.1.alpha="),
        (["logger.mode=online"], "logger.mode has moved; use logger.wandb.mode="),
        (["ablation=noise", "stage=1"], "ablation 'noise' has no stage 1"),
        (["stages.1.lrr=1"], "Could not override 'stages.1.lrr'"),
        (
            ["stage=2"],
            "holds no finished stage 1; run the same command with stage=1 first, or name one with init_from=",
        ),
        (["stages/for_model=scenes_tinny"], "there is no 'scenes_tinny'; did you mean 'scenes_tiny'?"),
        (["stages/for_model=foo"], "stages/for_model: there is no 'foo'; the choices are scenes_tiny"),
        (["+logger.x={_target_: lightning.pytorch.loggers.CometLogger}"], "install what it needs or choose another"),
        (["hydra.run.dir="], "hydra.run.dir= names no folder"),
        (["hydra/launcher=foo"], "Could not find 'hydra/launcher/foo' Available options in 'hydra/launcher': basic"),
        (["resume=latest"], "holds no run that was started and not finished"),
        (["model.max_length=20"], "of 20 tokens; shorten it"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_command_line_that_cannot_be_run(arguments, part, world, tmp_path):
    assert part in refused(world, tmp_path, f"outputs={tmp_path}", *arguments)
    assert not (tmp_path / "run").exists()
    after_the_data = arguments in (["stage=2"], ["model.max_length=20"])
    assert (tmp_path / "scenes").exists() == after_the_data, "what needs no data is told before they are made"


def test_a_folder_that_cannot_be_written(world, tmp_path):
    (tmp_path / "file").write_text("")
    said = refused(world, tmp_path, f"hydra.run.dir={tmp_path}/file/run")
    assert f"{tmp_path}/file/run: Not a directory; free space or choose another folder" in said


def test_a_disk_that_is_full_from_the_start(world, tmp_path):
    def tiny_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))

    command = settings(world, f"hydra.run.dir={tmp_path}/run")
    read, write = os.pipe()  # the log must not be a file

    def to_pipe() -> None:
        tiny_files()
        os.dup2(write, 1), os.dup2(write, 2)
        sys.stdout = sys.stderr = os.fdopen(write, "w", buffering=1)

    status, _ = train(*command, log=tmp_path / "log", sabotage=to_pipe)
    os.close(write)
    printed = os.read(read, 2**16).decode()
    assert status == 2 and "error: the run folder: File too large; free space or choose another folder" in printed


def test_data_that_cannot_be_used(world, tmp_path, data):
    assert "preferences.json" in refused(world, tmp_path, *on(tmp_path / "nowhere"), f"data.images={data}")

    change(data, lambda records: {"a": 1})
    assert "preferences.json" in refused(world, tmp_path, *on(data))

    shutil.copy(world / "sound" / "preferences.json", data)
    change(data, lambda records: records[3].pop("image") and None)
    assert "'image'" in refused(world, tmp_path, *on(data))

    shutil.copy(world / "sound" / "preferences.json", data)
    change(data, lambda records: records[4].update(rejected_conversations=records[4]["conversations"]))
    name = json.loads((data / "preferences.json").read_text())[4]["id"]
    assert repr(name) in refused(world, tmp_path, *on(data))


def test_a_broken_picture_is_reported_or_skipped_and_counted(world, tmp_path, data):
    records = json.loads((data / "preferences.json").read_text())
    picture = data / records[5]["image"]
    picture.write_bytes(picture.read_bytes()[:60])
    said = refused(world, tmp_path, *on(data))
    assert f"{data}/preferences.json holds" in said
    assert f"record {records[5]['id']!r}: picture {picture} cannot be decoded" in said
    assert "data.skip_bad=true" in said

    unseen = tmp_path / "unseen"  # the check at the start looks at other records
    assert finish(settings(world, *on(data)), unseen, lambda: setattr(experiment, "CHECKED_AT_START", 0)) == 2
    assert str(picture) in unseen.with_suffix(".log").read_text()

    status, printed = train(
        *settings(world, *on(data), "data.skip_bad=true", "ablation=text", f"hydra.run.dir={tmp_path}/skipped"),
        log=tmp_path / "log",
    )
    assert status == 0, printed
    assert "records are skipped (data.skip_bad)" in printed and str(picture) in printed
    used = json.loads((tmp_path / "skipped" / "stage_1" / "stage.json").read_text())["records"]
    assert used == sum(record["image"] != records[5]["image"] for record in records)


def test_one_bad_job_does_not_end_a_sweep(world, tmp_path, data):
    (data / "preferences.json").write_text("[")
    status, printed = train(
        "-m", *settings(world, *on(data), "ablation=text,none", f"hydra.sweep.dir={tmp_path}/s"), log=tmp_path / "log"
    )
    assert status == 2
    assert "Traceback" not in printed
    assert "error in job 0 (" in printed
    assert f"python -m povid.report {tmp_path}/s" in printed
    assert not (tmp_path / "s" / "0_text_seed0" / "results.json").exists()
    assert (tmp_path / "s" / "1_none_seed0" / "results.json").exists()


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_loss_that_is_not_finite_stops_the_run(value, world, tmp_path):
    def sabotage() -> None:
        honest = POVIDModule.measured

        def sabotaged(self, batch, known_reference=None):
            outcome, reference, metrics = honest(self, batch, known_reference)
            if self._trainer is None or self.trainer.global_step < 4:
                return outcome, reference, metrics
            print("batch", batch.names)
            loss_B = outcome.loss_B * float(value)
            return outcome._replace(loss_B=loss_B), reference, metrics | {"loss": loss_B.detach().mean()}

        POVIDModule.measured = sabotaged

    assert finish(settings(world), tmp_path / value, sabotage) == 2
    log = (tmp_path / f"{value}.log").read_text()
    names = log[log.rindex("batch [") + 7 : log.index("]", log.rindex("batch ["))]
    assert f"error: stage 1: the loss of step 5 is {value}; its records are {names}; check them" in log
    assert f"The last good checkpoint is {tmp_path / value}/stage_1/checkpoints/step_00000004." in log


def test_a_full_disk_loses_no_finished_work(world, tmp_path):
    """Files are limited to 30 kB, into which checkpoints and adapters do not fit, as on a full disk."""
    assert finish(settings(world), tmp_path / "free") == 0

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))

    assert finish(settings(world, "resume=true"), tmp_path / "full", small_files) == 2
    log = (tmp_path / "full.log").read_text()
    assert f"error: there is no space left to write in {tmp_path}/full; free some and resume with resume=latest" in log
    assert "Traceback" not in log[log.index("error: ") :]
    assert finish(settings(world, "resume=true"), tmp_path / "full") == 0
    assert outcome(tmp_path / "full") == outcome(tmp_path / "free")
