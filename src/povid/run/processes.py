"""The processes of one run: the first prepares, writes and evaluates; the others only train."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import open_dict, read_write

from povid.fault import Fault
from povid.internals import script_launcher, stop_watching_children
from povid.run.resume import config_dirs

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


def end_children(trainer: L.Trainer) -> None:
    """Kill the processes that a trainer started, after an error in this one, for which they would wait forever."""
    launcher = script_launcher(trainer)
    if launcher is None:
        return
    stop_watching_children()  # or Lightning would end this process too, and with it the rest of a sweep
    for child in launcher.procs:
        if child.poll() is None:
            child.send_signal(signal.SIGKILL)
        child.wait()
