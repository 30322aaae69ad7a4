"""Runs in forks of the test's process: a second or two each, since nothing is imported anew."""

from __future__ import annotations

import csv
import functools
import hashlib
import logging
import multiprocessing
import os
import runpy
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from hydra import compose, initialize_config_dir

from povid.fault import Fault
from povid.run import experiment
from povid.run.checkpoint import Checkpoints
from povid.run.signals import Stopped

CONF = Path(__file__).resolve().parents[1] / "conf"
TRAIN = CONF.parent / "train.py"
FORK = multiprocessing.get_context("fork")


def settings(world: Path, *more: str) -> list[str]:
    """Two stages of two epochs; 9 records in batches of 2 make 5 batches an epoch, the last one short."""
    return [
        f"outputs={world}/out",
        f"model.path={world}/tiny",
        "model.max_length=400",
        "model.lora.dropout=0.1",
        "data.prepare.preferences=9",
        "data.prepare.evaluation=1",
        "data.prepare.tuning=1",
        "samples=0",
        "stages.1.epochs=2",
        "stages.2.epochs=2",
        "stages.1.batch_size=2",
        "stages.2.batch_size=2",
        "stages.1.lr=5e-4",
        "stages.2.lr=5e-4",
        "checkpoint.every_steps=2",
        "logger=none",
        "benchmarks=[pope]",
        *more,
    ]


@functools.cache
def composed(*overrides: str):
    """The configuration that a command line amounts to."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def run(overrides: list[str], folder: Path, sabotage: Callable[[], None] = lambda: None) -> FORK.Process:
    """A fork that runs; it exits with 0, 2 (Fault) 143 or 130 (Stopped), or dies of what ``sabotage`` prepared."""

    def work() -> None:
        sys.stdout = sys.stderr = folder.with_suffix(".log").open("a", buffering=1)
        logging.basicConfig(stream=sys.stderr, level=logging.INFO, force=True)
        sabotage()
        try:
            experiment.run(config, folder)
        except Fault as fault:
            print(f"error: {fault}", flush=True)
            os._exit(2)
        except Stopped as stopped:
            print(f"stopped: {stopped}", flush=True)
            os._exit(stopped.status)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    config = composed(*overrides)
    process = FORK.Process(target=work)
    process.start()
    return process


def finish(overrides: list[str], folder: Path, sabotage: Callable[[], None] = lambda: None) -> int:
    """Exit status of a run, negative for the signal that ended it. What it printed is in ``folder.log``."""
    process = run(overrides, folder, sabotage)
    process.join(900)
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


def train(*arguments: str, log: Path, sabotage: Callable[[], None] = lambda: None) -> tuple[int, str]:
    """Exit status of ``python train.py ARGUMENTS`` and what it printed."""

    def work() -> None:
        sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(sink, 1), os.dup2(sink, 2)
        sys.stdout = sys.stderr = os.fdopen(sink, "w", buffering=1)
        sys.argv = [str(TRAIN), *arguments]
        sabotage()
        try:
            runpy.run_path(str(TRAIN), run_name="__main__")
        except SystemExit as leave:
            os._exit(leave.code or 0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    process = FORK.Process(target=work)
    process.start()
    process.join(900)
    return process.exitcode, log.read_text()


def at_step(stage: int, step: int, number: signal.Signals) -> Callable[[], None]:
    """The signal comes after a step's optimiser and before anything else."""

    def sabotage() -> None:
        honest = Checkpoints.on_train_batch_end

        def batch_end(self, trainer, module, *rest):
            if f"stage_{stage}" in str(self.folder) and trainer.global_step == step:
                os.kill(os.getpid(), number)
            honest(self, trainer, module, *rest)

        Checkpoints.on_train_batch_end = batch_end

    return sabotage
