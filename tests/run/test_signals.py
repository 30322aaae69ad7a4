"""Signals from the first to the last moment of a run, and runs that never begin."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from forks import FORK, at_step, finish, outcome, run, settings, train

from povid.model.generation import Answers
from povid.run import evaluation, experiment
from povid.run.checkpoint import Checkpoints
from povid.run.stage import Stage


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("signals")
    tiny.save_tiny_llava(folder / "tiny")
    return folder


def before(owner: object, name: str, number: signal.Signals) -> Callable[[], None]:
    """The signal comes when a function is called."""

    def sabotage() -> None:
        honest = getattr(owner, name)

        def called(*arguments, **more):
            os.kill(os.getpid(), number)
            return honest(*arguments, **more)

        setattr(owner, name, called)

    return sabotage


def after_last_step(stage: int, number: signal.Signals) -> Callable[[], None]:
    def sabotage() -> None:
        honest = Stage._fit

        def fit(self, *rest):
            steps = honest(self, *rest)
            if self.number == stage:
                os.kill(os.getpid(), number)
            return steps

        Stage._fit = fit

    return sabotage


def test_every_signal_at_every_moment_leaves_a_run_that_resumes(world, tmp_path):
    assert finish(settings(world), tmp_path / "undisturbed") == 0
    folder, log = tmp_path / "run", tmp_path / "run.log"
    again = settings(world, "resume=true")
    for sabotage, status, said in (
        (before(experiment, "load_triples", signal.SIGTERM), 143, "SIGTERM: what is finished is kept"),
        (before(Stage, "load", signal.SIGINT), 130, "SIGINT: what is finished is kept"),
        (at_step(1, 3, signal.SIGINT), 130, "SIGINT: saved after step 3"),
        (after_last_step(1, signal.SIGTERM), 143, "SIGTERM: what is finished is kept"),
        (at_step(2, 9, signal.SIGINT), 130, "SIGINT: saved after step 9"),
        (before(Answers, "__call__", signal.SIGINT), 130, "SIGINT: what is finished is kept"),
    ):
        log.unlink(missing_ok=True)
        assert finish(again, folder, sabotage) == status, log.read_text()
        assert f"stopped: {said} in {folder}; resume with resume=latest" in log.read_text()
    assert finish(again, folder) == 0
    assert "stage 1 is finished already" in log.read_text() and "stage 2 is finished already" in log.read_text()
    assert outcome(folder) == outcome(tmp_path / "undisturbed")


def test_the_second_interrupt_ends_a_run_at_once(world, tmp_path):
    stuck = FORK.Event()

    def sabotage() -> None:
        def batch_end(self, trainer, module, *rest):
            os.kill(os.getpid(), signal.SIGINT)  # noted, since a stage trains
            stuck.set()
            while True:
                signal.pause()

        Checkpoints.on_train_batch_end = batch_end

    process = run(settings(world, "data.workers=1"), tmp_path / "run", sabotage)
    assert stuck.wait(300)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == -signal.SIGINT


def test_the_requeue_signal_requeues_in_preparation_loading_and_evaluation(world, tmp_path):
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/told\n')
    scontrol.chmod(0o755)
    command = settings(
        world, "ablation=text", "+trainer.plugins=[{_target_: lightning.pytorch.plugins.environments.SLURMEnvironment}]"
    )
    variables = {
        "SLURM_JOB_ID": "42",
        "SLURM_NTASKS": "1",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
        "SLURM_JOB_NODELIST": "here",
        "SLURM_RESTART_COUNT": "1",
        "PATH": f"{scontrol.parent}:{os.environ['PATH']}",
    }
    folder = tmp_path / "run"
    moments = ((experiment, "load_triples"), (Stage, "load"), (Answers, "__call__"))
    for count, (owner, name) in enumerate(moments, 1):
        signalled = before(owner, name, signal.SIGUSR1)
        assert finish(command, folder, lambda: (os.environ.update(variables), signalled())) == 143, name  # noqa: B023
        assert (tmp_path / "told").read_text() == "requeue 42\n" * count
    assert finish(command, folder, lambda: os.environ.update(variables)) == 0


def test_what_can_never_run_leaves_no_folder_and_is_not_resumed(world, tmp_path):
    command = settings(world, f"outputs={tmp_path}")
    for problem in (["seed=-1"], ["stage=2"], ["data.prepare=null", f"data.folder={tmp_path}/none"]):
        status, printed = train(*command, *problem, log=tmp_path / "log")
        assert status == 2, printed
        assert not [*tmp_path.rglob("*.yaml")] and not [*(tmp_path / "runs").iterdir()], problem
    status, printed = train(*command, "resume=true", log=tmp_path / "log")
    assert status == 2 and "resume=true needs the folder of the run: add hydra.run.dir=FOLDER" in printed
    assert not [*(tmp_path / "runs").iterdir()]

    status, printed = train("-m", *command, "ablation=none", "seed=0,-1", log=tmp_path / "log")
    assert status == 2
    (note,) = tmp_path.rglob("error.txt")
    assert "seed: found -1" in note.read_text() and note.parent.name == "1_none_seed-1"
    status, printed = train("resume=latest", f"outputs={tmp_path}", log=tmp_path / "log")
    assert status == 2 and "holds no run that was started and not finished" in printed


def test_a_run_killed_in_preparation_is_found(world, tmp_path):
    command = settings(world, f"outputs={tmp_path}", "ablation=none")
    killed = before(evaluation, "warn_of_missing", signal.SIGKILL)
    assert train(*command, log=tmp_path / "log", sabotage=killed)[0] == -9
    status, printed = train("resume=latest", f"outputs={tmp_path}", log=tmp_path / "log")
    assert status == 0, printed
    (folder,) = (tmp_path / "runs").iterdir()
    assert (folder / "results.json").exists()
