"""A run folder belongs to one process, for as long as that process lives."""

from __future__ import annotations

import json
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tiny
from forks import FORK, at_step, finish, run, settings, train

from povid.fault import Fault
from povid.run import lock
from povid.run.checkpoint import Checkpoints
from povid.run.resume import expand


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lock")
    tiny.save_tiny_llava(folder / "tiny")
    return folder


def test_a_folder_of_a_run_in_progress_is_refused_and_passed_over(world, tmp_path):
    reached, proceed = FORK.Event(), FORK.Event()

    def waiting() -> None:
        honest = Checkpoints.on_train_batch_end

        def batch_end(self, trainer, module, *rest):
            honest(self, trainer, module, *rest)
            if trainer.global_step == 3:
                reached.set()
                proceed.wait(300)

        Checkpoints.on_train_batch_end = batch_end

    folder = tmp_path / "runs" / "a"
    folder.mkdir(parents=True)
    (folder / ".hydra").mkdir()
    (folder / ".hydra" / "hydra.yaml").write_text(json.dumps({"hydra": {"overrides": {"task": [], "hydra": []}}}))
    command = settings(world, "ablation=text", "data.workers=1")
    process = run(command, folder, waiting)
    assert reached.wait(300)
    before = sorted(file for file in folder.rglob("*") if file.is_file())
    assert finish([*command, "resume=true"], folder) == 2
    log = folder.with_suffix(".log").read_text()
    assert f"error: {folder} is in use by a run in progress" in log
    assert sorted(file for file in folder.rglob("*") if file.is_file()) == before
    with pytest.raises(Fault, match="not in progress"):
        expand(["resume=latest", f"outputs={tmp_path}"])
    process.kill()
    process.join()
    assert expand(["resume=latest", f"outputs={tmp_path}"])[-1] == f"hydra.run.dir='{folder}'"
    assert finish([*command, "resume=true"], folder) == 0, "a loader process that is left over does not hold the lock"


def test_runs_and_sweeps_that_start_together_have_folders_of_their_own(world, tmp_path):
    command = [*settings(world, "ablation=none", f"outputs={tmp_path}"), "benchmarks=[]"]
    with ThreadPoolExecutor() as pool:
        logs = [tmp_path / f"log{i}" for i in range(4)]
        jobs = [pool.submit(train, *command, log=log) for log in logs[:2]]
        jobs += [pool.submit(train, "-m", *command, log=log) for log in logs[2:]]
        for job in jobs:
            status, printed = job.result()
            assert status == 0, printed
    assert len(list((tmp_path / "runs").iterdir())) == 2
    assert len(list((tmp_path / "sweeps").iterdir())) == 2
    assert len(list(tmp_path.rglob("results.json"))) == 4


def test_a_command_that_is_refused_does_not_replace_the_one_that_the_run_was_started_with(world, tmp_path):
    """Hydra writes its own record before the run can refuse: in a folder in use, and in one that is not resumed."""
    folder, log = tmp_path / "run", tmp_path / "log"
    place = [f"outputs={tmp_path}", f"hydra.run.dir={folder}"]
    started = [*settings(world, "ablation=text"), *place]
    status, printed = train(*started, log=log, sabotage=at_step(1, 1, signal.SIGKILL))
    assert status == -9, printed
    expected = expand(["resume=latest", f"outputs={tmp_path}"])
    assert "ablation=text" in expected and "seed=3" not in expected
    with lock.held(folder):
        status, printed = train(*started, "seed=3", "resume=true", log=log)
        assert status == 2 and f"error: {folder} is in use by a run in progress" in printed
    assert train(*started, "seed=3", log=log)[0] == 2
    assert train(*started, "seed=3", "resume=true", log=log)[0] == 2
    assert "seed=3" in (folder / ".hydra" / "overrides.yaml").read_text()
    assert expand(["resume=latest", f"outputs={tmp_path}"]) == expected


def test_a_sweep_in_progress_is_refused_and_passed_over(world, tmp_path):
    command = [*settings(world, "ablation=none", f"outputs={tmp_path}", f"hydra.sweep.dir={tmp_path}/s")]
    status, printed = train(
        "-m", *command, "ablation=text,none", log=tmp_path / "log", sabotage=at_step(1, 3, signal.SIGKILL)
    )
    assert status == -9, printed
    with lock.held(tmp_path / "s"):
        note = (tmp_path / "s" / "multirun.yaml").stat().st_mtime_ns
        status, printed = train("-m", *command, "seed=3", log=tmp_path / "log")
        assert status == 2 and f"error: {tmp_path}/s is in use by a run in progress" in printed
        assert (tmp_path / "s" / "multirun.yaml").stat().st_mtime_ns == note
        assert train("resume=latest", f"outputs={tmp_path}", log=tmp_path / "log")[0] == 2
    status, printed = train("-m", *command, "seed=3", log=tmp_path / "log")
    assert status == 2 and f"error: {tmp_path}/s holds a sweep already; choose another hydra.sweep.dir" in printed
    assert (tmp_path / "s" / "multirun.yaml").stat().st_mtime_ns == note
    assert expand(["resume=latest", f"outputs={tmp_path}"])[-1] == f"hydra.sweep.dir='{tmp_path}/s'"


def test_a_lock_ends_with_its_process(tmp_path):
    locked = FORK.Event()

    def hold() -> None:
        with lock.held(tmp_path):
            locked.set()
            FORK.Event().wait(300)

    process = FORK.Process(target=hold)
    process.start()
    assert locked.wait(60) and lock.in_progress(tmp_path)
    process.kill()
    process.join()
    assert not lock.in_progress(tmp_path)
