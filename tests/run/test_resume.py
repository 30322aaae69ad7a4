"""Runs that are killed and resumed have the losses and adapters of an uninterrupted run, bit for bit.

Runs are forks of the test process, which start within a second or two and kill themselves at chosen moments.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import yaml
from forks import at_step, finish, outcome, run, settings

from povid.fault import Fault
from povid.run import checkpoint
from povid.run import stage as stage_file
from povid.run.checkpoint import Checkpoints, checkpoints, newest
from povid.run.resume import expand


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    tiny.save_tiny_llava(folder / "tiny")
    return folder


@pytest.fixture(scope="module")
def undisturbed(world):
    """Outcomes of uninterrupted runs, by their additional settings."""
    known: dict[tuple[str, ...], dict[str, object]] = {}

    def get(*more: str) -> dict[str, object]:
        if more not in known:
            folder = world / f"undisturbed_{len(known)}"
            assert finish(settings(world, *more), folder) == 0, folder.with_suffix(".log").read_text()
            known[more] = outcome(folder)
        return known[more]

    return get


# --- ways to die -----------------------------------------------------------------------------------------------------


def while_writing(stage: int, step: int) -> Callable[[], None]:
    """Killed when half of a checkpoint is on disk."""

    def sabotage() -> None:
        honest = Checkpoints.save

        def save(self, trainer):
            if f"stage_{stage}" in str(self.folder) and trainer.global_step == step:

                def torn(place):
                    trainer_save(place)
                    os.truncate(place, place.stat().st_size // 2)
                    os.kill(os.getpid(), signal.SIGKILL)

                trainer_save, trainer.save_checkpoint = trainer.save_checkpoint, torn
            honest(self, trainer)

        Checkpoints.save = save

    return sabotage


def before_rename() -> None:
    """Killed when stage 1's adapter is written and not yet in its place."""

    def replace(source, target):
        if str(target).endswith("stage_1/adapter"):
            os.kill(os.getpid(), signal.SIGKILL)
        honest(source, target)

    honest, os.replace = os.replace, replace


def damaged(folder: Path) -> Path:
    """The newest checkpoint of stage 1 loses its second half."""
    place = checkpoints(folder / "stage_1" / "checkpoints")[0]
    os.truncate(place, place.stat().st_size // 2)
    return place


def test_a_run_killed_everywhere_ends_as_if_nothing_had_happened(world, undisturbed):
    """One run that dies eight times, by both signals, in both stages and at every kind of moment."""
    folder, log = world / "killed", world / "killed.log"
    again = settings(world, "resume=true")

    def dies(sabotage: Callable[[], None], status: int) -> None:
        assert finish(again, folder, sabotage) == status, log.read_text()
        assert not (folder / "results.json").exists()

    dies(at_step(1, 1, signal.SIGKILL), -9)  # before the first checkpoint
    assert finish(settings(world), folder) == 2
    assert "holds a run already (config.yaml, stage_1); choose another hydra.run.dir" in log.read_text()
    dies(at_step(1, 1, signal.SIGTERM), 143)  # in the first epoch
    assert "stopped: SIGTERM: saved after step 1 in" in log.read_text()
    assert finish([*again, "stages.1.lr=1e-3", "seed=1"], folder) == 2
    assert "seed was 0 and is now 1; stages.1.lr was 0.0005 and is now 0.001" in log.read_text()
    dies(while_writing(1, 4), -9)
    dies(at_step(1, 5, signal.SIGTERM), 143)  # at the end of an epoch
    dies(at_step(1, 9, signal.SIGKILL), -9)
    place = damaged(folder)
    dies(before_rename, -9)
    assert f"{place} is damaged" in log.read_text()
    assert "stage 1 resumes after step 6" in log.read_text()
    dies(at_step(2, 9, signal.SIGKILL), -9)
    dies(at_step(2, 10, signal.SIGTERM), 143)  # at the very end
    assert finish(again, folder) == 0, log.read_text()
    assert outcome(folder) == undisturbed()

    before = (folder / "results.json").read_bytes()
    assert finish(again, folder) == 0
    assert (folder / "results.json").read_bytes() == before, "a finished run is left alone"


def test_with_workers_accumulation_and_means_over_three_steps(world, undisturbed):
    """Kills fall between two logging steps, so that a mean is of steps before and after one."""
    more = ("data.workers=2", "trainer.log_every_n_steps=3", "stages.1.accumulate=2", "stages.2.accumulate=2")
    folder = world / "killed_with_workers"
    assert finish(settings(world, *more), folder, at_step(1, 4, signal.SIGTERM)) == 143
    assert finish(settings(world, *more, "resume=true"), folder, at_step(2, 5, signal.SIGKILL)) == -9
    assert finish(settings(world, *more, "resume=true"), folder) == 0, folder.with_suffix(".log").read_text()
    assert outcome(folder) == undisturbed(*more[1:]), "workers change no number either"
    means, steps = (undisturbed(*some)["losses of stage 1"] for some in (more[1:], more[2:]))
    losses = [float(dict(row)["loss"]) for row in steps]
    expected = {last: sum(losses[last - i] * n for i, n in enumerate((1, 2, 2))) / 5 for last in (2, 5)}
    found = {int(dict(row)["step"]): float(dict(row)["loss"]) for row in means}
    assert found == pytest.approx(expected), "the mean over an epoch's five batches"


def test_a_loader_process_that_dies_costs_no_step(world, undisturbed):
    def killed() -> None:
        honest = Checkpoints.on_train_batch_end

        def batch_end(self, trainer, module, *rest):
            if "stage_1" in str(self.folder) and trainer.global_step in (1, 6):
                for worker in multiprocessing.active_children():
                    worker.kill()
            honest(self, trainer, module, *rest)

        Checkpoints.on_train_batch_end = batch_end

    command = settings(world, "data.workers=2", "checkpoint.every_steps=null")
    folder, log = world / "loader", world / "loader.log"
    assert finish(command, folder, killed) == 2, log.read_text()
    (step,) = re.findall(r"error: stage 1: a loader process died after step (\d) \(", log.read_text())
    assert "with resume=latest and fewer processes, data.workers=1" in log.read_text()
    (saved,) = checkpoints(folder / "stage_1" / "checkpoints")
    assert checkpoint.step_of(saved) == int(step), log.read_text()
    assert finish([*command, "resume=true"], folder, killed) == 2
    assert finish([*command, "resume=true", "data.workers=0"], folder) == 0, log.read_text()
    assert f"stage 1 resumes after step {step}" in log.read_text()
    assert outcome(folder) == undisturbed()


def test_one_flipped_bit_is_noticed(tmp_path):
    content = bytearray(os.urandom(1000))
    for step in (4, 6):
        (tmp_path / "draft").write_bytes(content)
        os.replace(tmp_path / "draft", tmp_path / f"step_{step:08d}.{checkpoint.checksum(tmp_path / 'draft'):08x}.ckpt")
    later, earlier = checkpoints(tmp_path)
    assert newest(tmp_path) == later and checkpoint.step_of(later) == 6
    content[500] ^= 1
    later.write_bytes(content)
    assert newest(tmp_path) == earlier


# --- resume=latest ---------------------------------------------------------------------------------------------------


def begun(folder: Path, task: list[str], when: int, *, ended: bool = False, hydra: list[str] | None = None) -> Path:
    (folder / ".hydra").mkdir(parents=True)
    (folder / "config.yaml").write_text("{}")
    note = folder / ".hydra" / "hydra.yaml"
    note.write_text(json.dumps({"hydra": {"overrides": {"task": task, "hydra": hydra or ["hydra.mode=RUN"]}}}))
    os.utime(note, (when, when))
    if ended:
        (folder / "results.json").write_text("{}")
    return folder


def test_latest_is_the_newest_unfinished_run(tmp_path):
    begun(tmp_path / "runs" / "a", ["seed=1", "ablation=text"], 100)
    begun(tmp_path / "runs" / "b", ["seed=2", "ablation=noise"], 200)
    begun(tmp_path / "runs" / "c", ["seed=3"], 300, ended=True)
    assert expand(["resume=latest", f"outputs={tmp_path}", "ablation=noise"]) == [
        "seed=2",
        f"outputs={tmp_path}",
        "ablation=noise",
        "resume=true",
        f"hydra.run.dir='{tmp_path}/runs/b'",
    ]
    assert expand(["seed=1", "resume=true"]) == ["seed=1", "resume=true"]
    with pytest.raises(Fault, match="holds no sweep that was started and not finished"):
        expand(["-m", "resume=latest", f"outputs={tmp_path}"])


def test_latest_of_a_sweep_is_the_sweep(tmp_path):
    sweep = tmp_path / "sweeps" / "s"
    begun(sweep / "0", ["ablation=none"], 100, ended=True)
    begun(sweep / "1", ["ablation=text"], 110)
    (sweep / "multirun.yaml").write_text(
        json.dumps(
            {
                "hydra": {
                    "overrides": {
                        "task": ["ablation=none,text,both", "samples=2"],
                        "hydra": ["hydra.mode=MULTIRUN", "hydra/launcher=joblib"],
                    }
                }
            }
        )
    )
    assert expand(["resume=latest", f"outputs={tmp_path}"]) == [
        "-m",
        "hydra/launcher=joblib",
        "ablation=none,text,both",
        "samples=2",
        f"outputs={tmp_path}",
        "resume=true",
        f"hydra.sweep.dir='{sweep}'",
    ]
    (sweep / "1" / "results.json").write_text("{}")
    (sweep / "tables").mkdir()
    (sweep / "tables" / "table3.md").write_text("")
    with pytest.raises(Fault, match="holds no run that was started and not finished"):
        expand(["resume=latest", f"outputs={tmp_path}"])


def test_what_a_run_folder_says_is_not_trusted(tmp_path, monkeypatch):
    """A folder from elsewhere can run no code, load no file from outside conf/, read no variable and get no key."""
    folder = tmp_path / "run"
    (folder / ".hydra").mkdir(parents=True)
    (folder / "config.yaml").write_text("seed: 0")

    def started(hydra: object, task: object) -> None:
        saved = {"hydra": {"overrides": {"hydra": hydra, "task": task}}}
        (folder / ".hydra" / "hydra.yaml").write_text(yaml.safe_dump(saved))

    for hydra, task, reason in (
        (["+hydra.callbacks.x={_target_: pandas.read_pickle}"], [], "no setting of a run"),
        (["hydra.searchpath=[file:///elsewhere]"], [], "no setting of a run"),
        ([], ["hydra/launcher=../elsewhere"], "no setting of a run"),
        ([], ["model@hydra.launcher=x"], "no setting of a run"),
        ([], ["+callbacks.x={_target_: pandas.read_pickle}"], "it names code"),
        ([], ["data.format._target_=pandas.read_pickle"], "it names code"),
        ([], ["experiment=../../elsewhere"], "it may lead out of conf/"),
        ([], ["data=scenes,/elsewhere"], "it may lead out of conf/"),
        ([], ["stages/for_model=../../elsewhere"], "it may lead out of conf/"),
        ([], ["generation.engine=../../elsewhere"], "it may lead out of conf/"),
        ([], ["--config-dir=/elsewhere"], "it is not an override"),
        ([], ["data.folder=${oc.env:HOME}"], "it holds a resolver"),
        ([], ["judge.base_url=http://elsewhere"], "keys are sent to it"),
    ):
        started(hydra, task)
        with pytest.raises(Fault) as fault:
            expand(["resume=latest", f"outputs={tmp_path}"])
        assert (hydra or task)[0] in str(fault.value) and reason in str(fault.value), fault.value

    for damaged in ("seed=1", [3], None):
        started([], damaged)
        with pytest.raises(Fault, match=r"hydra\.yaml does not hold the command line of a run"):
            expand(["resume=latest", f"outputs={tmp_path}"])

    started([], ["judge.base_url=http://mine", "adapters=[/a/b]", "model.path=/weights", "seed=1,2"])
    assert expand(["resume=latest", f"outputs={tmp_path}", "judge.base_url=http://mine"])[:3] == [
        "adapters=[/a/b]",
        "model.path=/weights",
        "seed=1,2",
    ]
    monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
    with pytest.raises(Fault, match=r"started by you \(1 by others, the newest is .*\) and not finished"):
        expand(["resume=latest", f"outputs={tmp_path}"])


def test_a_folder_of_settings_is_given_again_and_never_taken_from_a_run(tmp_path):
    folder = begun(tmp_path / "run", [], 100)
    command = {"config_dirs": ["/elsewhere"], "hydra": [], "task": ["seed=4"]}
    (folder / "command.yaml").write_text(yaml.safe_dump(command))
    with pytest.raises(Fault, match="was started with --config-dir=/elsewhere, which is not taken from there"):
        expand(["resume=latest", f"outputs={tmp_path}"])
    for given in (["--config-dir", "mine"], ["--config-dir=mine"]):
        assert expand([*given, "resume=latest", f"outputs={tmp_path}"]) == [
            *given,
            "seed=4",
            f"outputs={tmp_path}",
            "resume=true",
            f"hydra.run.dir='{folder}'",
        ]


# --- slow ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_twenty_random_kills(world, undisturbed):
    """TERM and KILL at random moments of a two-stage run, while checkpoints are written after every step too."""
    overrides = settings(world, "checkpoint.every_steps=1", "resume=true")
    expected = undisturbed()
    draw = random.Random(0)
    begin = time.monotonic()
    assert finish(overrides, world / "timed") == 0
    whole = time.monotonic() - begin
    kills = rounds = 0
    while kills < 20:
        folder = world / f"hunted_{rounds}"
        rounds += 1
        status = None
        while status != 0:
            process = run(overrides, folder)
            process.join(draw.uniform(0.2, whole))
            if process.exitcode is None:
                os.kill(process.pid, draw.choice([signal.SIGTERM, signal.SIGKILL]))
                kills += 1
                process.join(300)
            status = process.exitcode
            assert status in (0, 143, -9, -15), folder.with_suffix(".log").read_text()
        assert outcome(folder) == expected


def test_an_automatic_batch_size_stays_what_it_was(world):
    """The machine has more free memory when the run resumes than when it started."""

    def room(size: int, then: Callable[[], None] = lambda: None) -> Callable[[], None]:
        def sabotage() -> None:
            stage_file.largest_batch = lambda module, data: size
            then()

        return sabotage

    auto = settings(world, "stages.1.batch_size=auto", "stages.2.batch_size=auto")
    assert finish(auto, world / "auto_whole", room(2)) == 0
    assert finish(auto, world / "auto", room(2, at_step(1, 3, signal.SIGKILL))) == -signal.SIGKILL
    assert finish([*auto, "resume=true"], world / "auto", room(4, at_step(1, 7, signal.SIGTERM))) == 143
    assert "batches of 2" in (world / "auto.log").read_text() and "batches of 4" not in (world / "auto.log").read_text()
    config = json.loads((world / "auto_whole" / "results.json").read_text())
    assert config["stages"]["1"]["batch_size"] == 2
