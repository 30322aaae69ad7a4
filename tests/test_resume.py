"""Runs that are killed and gone on with have the losses and the adapters of the run that was left alone, bit for bit.

Runs are forks of the test's process, so that one takes a second or two; the forks kill themselves where they are told.
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from hydra import compose, initialize_config_dir

from povid import checkpoint, experiment
from povid.checkpoint import Checkpoints, Stopped, checkpoints, newest
from povid.fault import Fault
from povid.resume import expand

CONF = Path(__file__).resolve().parents[1] / "conf"
FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    tiny.save_tiny_llava(folder / "tiny")
    return folder


def settings(world: Path, *more: str) -> list[str]:
    """Two stages of two epochs; 9 records in batches of 2 make 5 batches an epoch, the last one short."""
    return [f"outputs={world}/out", f"model.path={world}/tiny", "model.max_length=400", "model.lora.dropout=0.1",
            "data.prepare.preferences=9", "data.prepare.evaluation=1", "data.prepare.tuning=1", "samples=0",
            "stages.1.epochs=2", "stages.2.epochs=2", "stages.1.batch_size=2", "stages.2.batch_size=2",
            "checkpoint.every_steps=2", "logger=csv", "benchmarks=[pope]", *more]


def configured(overrides: list[str]):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=overrides)


def run(overrides: list[str], folder: Path, sabotage: Callable[[], None] = lambda: None) -> FORK.Process:
    """A fork that runs; it exits with 0, 2 (Fault) or 143 (Stopped), or dies of what ``sabotage`` prepared."""

    def work() -> None:
        sys.stdout = sys.stderr = folder.with_suffix(".log").open("a", buffering=1)
        logging.basicConfig(stream=sys.stderr, force=True)
        sabotage()
        try:
            experiment.run(configured(overrides), folder)
        except Fault as fault:
            print(f"error: {fault}", flush=True)
            os._exit(2)
        except Stopped as stopped:
            print(f"stopped: {stopped}", flush=True)
            os._exit(143)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    process = FORK.Process(target=work)
    process.start()
    return process


def finish(overrides: list[str], folder: Path, sabotage: Callable[[], None] = lambda: None) -> int:
    process = run(overrides, folder, sabotage)
    process.join(120)
    assert process.exitcode is not None, "the run hangs"
    return process.exitcode


def outcome(folder: Path) -> dict[str, object]:
    """Every logged number as it was written, and the bytes of the adapters."""
    found: dict[str, object] = {}
    for stage in (1, 2):
        home = folder / f"stage_{stage}"
        with (home / "metrics.csv").open(newline="") as file:
            found[f"losses of stage {stage}"] = [tuple(row.items()) for row in csv.DictReader(file)]
        weights = (home / "adapter" / "adapter_model.safetensors").read_bytes()
        found[f"adapter of stage {stage}"] = hashlib.sha256(weights).hexdigest()
        assert not (home / "checkpoints").exists(), "checkpoints of a finished stage are removed"
    return found


@pytest.fixture(scope="module")
def undisturbed(world):
    """Outcomes of runs that nobody disturbed, by their additional settings."""
    known: dict[tuple[str, ...], dict[str, object]] = {}

    def get(*more: str) -> dict[str, object]:
        if more not in known:
            folder = world / f"undisturbed_{len(known)}"
            assert finish(settings(world, *more), folder) == 0, folder.with_suffix(".log").read_text()
            known[more] = outcome(folder)
        return known[more]

    return get


# --- ways to die -----------------------------------------------------------------------------------------------------


def at_step(stage: int, step: int, number: signal.Signals) -> Callable[[], None]:
    """The signal comes after a step's optimiser and before anything else (a step in stage 2 by the module's terms)."""

    def sabotage() -> None:
        honest = Checkpoints.on_train_batch_end

        def batch_end(self, trainer, module, *rest):
            if f"stage_{stage}" in str(self.folder) and trainer.global_step == step:
                os.kill(os.getpid(), number)
            honest(self, trainer, module, *rest)

        Checkpoints.on_train_batch_end = batch_end

    return sabotage


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


DEATHS = {
    "TERM in the first epoch of stage 1": (at_step(1, 1, signal.SIGTERM), 143),
    "TERM at the end of an epoch": (at_step(1, 5, signal.SIGTERM), 143),
    "TERM at the end of stage 2": (at_step(2, 10, signal.SIGTERM), 143),
    "KILL before the first checkpoint": (at_step(1, 1, signal.SIGKILL), -9),
    "KILL in the second epoch of stage 2": (at_step(2, 9, signal.SIGKILL), -9),
    "KILL while a checkpoint is written": (while_writing(1, 4), -9),
    "KILL before the adapter is in place": (before_rename, -9),
}


@pytest.mark.parametrize("death", DEATHS)
def test_a_killed_run_goes_on_as_if_nothing_had_been(death, world, undisturbed):
    sabotage, status = DEATHS[death]
    folder = world / death.replace(" ", "_")
    assert finish(settings(world), folder, sabotage) == status, folder.with_suffix(".log").read_text()
    assert not (folder / "results.json").exists()
    assert finish(settings(world, "resume=true"), folder) == 0, folder.with_suffix(".log").read_text()
    assert outcome(folder) == undisturbed()


@pytest.mark.parametrize("more", [("data.workers=2",), ("stages.1.accumulate=2", "stages.2.accumulate=2")], ids=str)
def test_with_workers_and_with_accumulation(more, world, undisturbed):
    folder = world / f"killed_{more[0]}"
    assert finish(settings(world, *more), folder, at_step(1, 3, signal.SIGTERM)) == 143
    assert finish(settings(world, *more, "resume=true"), folder, at_step(2, 4, signal.SIGKILL)) == -9
    assert finish(settings(world, *more, "resume=true"), folder) == 0, folder.with_suffix(".log").read_text()
    assert outcome(folder) == undisturbed(*more)


def test_workers_change_no_number(undisturbed):
    assert undisturbed("data.workers=2") == undisturbed()


@pytest.mark.parametrize("damage", ["truncated", "one bit"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(damage, world, undisturbed):
    folder = world / damage
    assert finish(settings(world), folder, at_step(1, 7, signal.SIGKILL)) == -9
    places = checkpoints(folder / "stage_1" / "checkpoints")
    assert [checkpoint.step_of(place) for place in places] == [6, 4]
    content = bytearray(places[0].read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    else:
        content[len(content) // 2] ^= 1
    places[0].write_bytes(content)
    assert newest(places[0].parent) == places[1]
    assert finish(settings(world, "resume=true"), folder) == 0
    log = folder.with_suffix(".log").read_text()
    assert f"{places[0]} is damaged" in log
    assert outcome(folder) == undisturbed()


def test_other_settings_are_refused_and_a_finished_run_is_left_alone(world):
    folder = world / "other"
    assert finish(settings(world), folder, at_step(1, 3, signal.SIGTERM)) == 143
    assert finish(settings(world, "resume=true", "stages.1.lr=1e-3", "seed=1"), folder) == 2
    log = folder.with_suffix(".log").read_text()
    assert "seed was 0 and is now 1; stages.1.lr was 0.00043 and is now 0.001" in log
    assert finish(settings(world), folder) == 2
    assert "holds a run already (config.yaml, stage_1)" in folder.with_suffix(".log").read_text()
    assert finish(settings(world, "resume=true", "checkpoint.every_steps=3", "data.workers=1"), folder) == 0
    before = (folder / "results.json").read_bytes()
    assert finish(settings(world, "resume=true"), folder) == 0
    assert (folder / "results.json").read_bytes() == before


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


def test_latest_is_the_newest_that_did_not_end(tmp_path):
    begun(tmp_path / "runs" / "a", ["seed=1", "ablation=text"], 100)
    begun(tmp_path / "runs" / "b", ["seed=2", "ablation=noise"], 200)
    begun(tmp_path / "runs" / "c", ["seed=3"], 300, ended=True)
    assert expand(["resume=latest", f"outputs={tmp_path}", "ablation=noise"]) == [
        "seed=2", f"outputs={tmp_path}", "ablation=noise", "resume=true", f"hydra.run.dir='{tmp_path}/runs/b'"]
    assert expand(["seed=1", "resume=true"]) == ["seed=1", "resume=true"]
    with pytest.raises(Fault, match="holds no sweep that has begun and not ended"):
        expand(["-m", "resume=latest", f"outputs={tmp_path}"])


def test_latest_of_a_sweep_is_the_sweep(tmp_path):
    sweep = tmp_path / "sweeps" / "s"
    begun(sweep / "0", ["ablation=none"], 100, ended=True)
    begun(sweep / "1", ["ablation=text"], 110)
    (sweep / "multirun.yaml").write_text(json.dumps({"hydra": {"overrides": {
        "task": ["ablation=none,text,both", "samples=2"], "hydra": ["hydra.mode=MULTIRUN", "hydra/launcher=joblib"]}}}))
    assert expand(["resume=latest", f"outputs={tmp_path}"]) == [
        "-m", "hydra/launcher=joblib", "ablation=none,text,both", "samples=2", f"outputs={tmp_path}", "resume=true",
        f"hydra.sweep.dir='{sweep}'"]
    (sweep / "1" / "results.json").write_text("{}")
    (sweep / "table3.md").write_text("")
    with pytest.raises(Fault, match="holds no run that has begun and not ended"):
        expand(["resume=latest", f"outputs={tmp_path}"])


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
                process.join(60)
            status = process.exitcode
            assert status in (0, 143, -9, -15), folder.with_suffix(".log").read_text()
        assert outcome(folder) == expected
