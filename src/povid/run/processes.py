"""The processes of one run: all train and answer questions; the first one prepares, scores and writes the rest."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import open_dict, read_write
from torch import distributed

from povid import files
from povid.benchmarks.processes import Processes, ProcessFailed
from povid.fault import Fault
from povid.internals import form_group, runs_the_script, script_launcher, stop_watching_children, watch_children
from povid.run.resume import config_dirs
from povid.run.signals import Signals

log = logging.getLogger(__name__)

GROUP = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def rank() -> int:
    """This process's number, from 0."""
    lightning: Any = rank_zero_only  # declares no rank
    return lightning.rank


def first() -> bool:
    """Whether this is the process that writes."""
    return rank() == 0


def device() -> torch.device:
    """This process's GPU, so that not all processes load onto the first one; the CPU if there is no GPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    place = int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)
    return torch.device("cuda", place % torch.cuda.device_count())


def wait_for(file: Path, seconds: float = 3600) -> None:
    """Wait until the first process has written ``file``. Processes that the trainer starts find it already written.

    Raises:
        Fault: the file did not appear, most likely because every process has a different folder.
    """
    end = time.monotonic() + seconds
    while not file.exists():
        if time.monotonic() > end:
            raise Fault(
                f"process {rank()} waited {seconds:.0f} s for {file}; give all processes of a run "
                "the same folder with hydra.run.dir="
            )
        time.sleep(0.5)


@contextmanager
def one_job(folder: Path) -> Iterator[None]:
    """Inside, processes that Lightning starts run only this job, in this folder; afterwards their group is left.

    Lightning starts them with this process's command line, which under ``-m`` would be the whole sweep, so here it
    becomes the job's own overrides and the folders in which their files are found. Lightning also leaves the process
    group and its environment behind, in which the next job would start none.
    """
    starts_group = not any(name in os.environ for name in GROUP)
    argv = list(sys.argv)
    if HydraConfig.initialized() and starts_group:
        config: Any = HydraConfig.instance().cfg
        with read_write(config.hydra), open_dict(config.hydra):
            config.hydra.run.dir = str(folder)
        overrides = config.hydra.overrides
        places = [f"--config-dir={place}" for place in config_dirs(config.hydra)]
        places += [override for override in overrides.hydra if override.startswith("hydra.searchpath=")]
        sys.argv[1:] = [*places, *overrides.task]
    try:
        yield
    finally:
        sys.argv[:] = argv
        if starts_group:
            leave_group()


def leave_group() -> None:
    """Leave the process group that Lightning made, and clear its environment."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for name in GROUP:
        os.environ.pop(name, None)


FAILED = "process_failed.txt"  # in the run's folder: what a process that failed says to those that still answer
KEPT = "what was answered is kept: resume with resume=latest"


class Group(Processes):
    """The processes of torch's process group, which talk to each other over gloo, on the CPU.

    Waiting has no time limit, since shares may take hours, and a signal interrupts it.

    Args:
        folder: of the run, which all of them see.
        launcher: has started the others from this process; None where somebody else has.
        strategy: Lightning's, which made the group.
    """

    def __init__(self, folder: Path, launcher: Any = None, strategy: Any = None) -> None:
        self.launcher, self.strategy = launcher, strategy
        self.number, self.of = distributed.get_rank(), distributed.get_world_size()
        self.control = distributed.new_group(backend="gloo", timeout=timedelta(days=365))
        self.note, self.looked = folder / FAILED, 0.0
        self.exchange(None)  # so that all of them exist

    def exchange(self, value: Any) -> list[Any]:
        content = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        try:
            sizes = [int(size) for size in self._gather(torch.tensor([len(content)]))]
            padded = torch.zeros(max(sizes), dtype=torch.uint8)
            padded[: len(content)] = content
            found = self._gather(padded)
        except RuntimeError as error:
            said = self.note.read_text(encoding="utf-8") if self.note.exists() else f"a process has ended ({error})"
            raise ProcessFailed(f"{said}; {KEPT}") from error
        return [pickle.loads(part[:size].numpy().tobytes()) for part, size in zip(found, sizes)]

    def _gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        found = [torch.empty_like(tensor) for _ in range(self.of)]
        work: Any = distributed.all_gather(found, tensor, group=self.control, async_op=True)
        pause = 1e-5
        while not work.is_completed():  # in work.wait() a signal would wait too
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
        work.wait()
        return found

    @contextmanager
    def together(self) -> Iterator[None]:
        own: Exception | None = None
        failure: Fault | None = None
        try:
            yield
        except ProcessFailed as fault:  # which somebody else says
            own = fault
        except Fault as fault:
            own, failure = fault, Fault(f"{fault} (process {self.number} of {self.of})")
        except Exception as error:
            said = f"process {self.number} of {self.of} failed: {type(error).__name__}: {error}"
            files.write_text(self.note, said)
            own, failure = error, ProcessFailed(f"{said}; {KEPT}")
        failures = [found for found in self.exchange(failure) if found is not None]
        if own is not None and not isinstance(own, ProcessFailed):
            raise own
        if failures:
            raise min(failures, key=lambda found: not isinstance(found, ProcessFailed))
        if own is not None:
            raise own

    def check(self) -> None:
        if time.monotonic() - self.looked >= 1:
            self.looked = time.monotonic()
            if self.note.exists():
                raise ProcessFailed(f"{self.note.read_text(encoding='utf-8')}; {KEPT}")

    @contextmanager
    def training(self) -> Iterator[None]:
        if self.launcher is not None and self.launcher.procs:
            watch_children(self.launcher)  # the others would wait forever for one that has failed
        try:
            yield
        finally:
            stop_watching_children()


@contextmanager
def gathered(trainer: L.Trainer | None, folder: Path, signals: Signals) -> Iterator[Processes]:
    """Inside, the processes of a run exist, and hear of its signals; None for a run of one process."""
    if first():
        (folder / FAILED).unlink(missing_ok=True)
    if trainer is None or not runs_the_script(trainer):
        yield Processes()
        return
    try:
        signals.launcher = form_group(trainer)
        group = Group(folder, signals.launcher, trainer.strategy)
        stop_watching_children()  # Lightning's observer would end this process before it can say why
        yield group
    except BaseException:
        end_children(script_launcher(trainer), 0)
        raise
    finally:
        signals.launcher = None
    end_children(script_launcher(trainer), 60)


def end_children(launcher: Any, seconds: float) -> None:
    """Wait so long for the processes that ``launcher`` started to end, and kill those that have not."""
    end = time.monotonic() + seconds
    for child in launcher.procs if launcher is not None else ():
        while child.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        if child.poll() is None:
            child.send_signal(signal.SIGKILL)
        child.wait()
