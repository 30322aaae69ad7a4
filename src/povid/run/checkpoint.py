"""Checkpoints, from which a stage resumes with exactly the losses of an uninterrupted one.

Besides what the trainer saves (trained weights, optimiser, schedule, position in the epoch), a checkpoint contains the
states of all random generators of all processes. It is written next to its final place, forced to disk and renamed.
Its name ends with a checksum, so that a truncated or damaged file is detected and the previous one is used.
"""

from __future__ import annotations

import logging
import os
import random
import re
import signal
import subprocess
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment
from pydantic import BaseModel, ConfigDict, Field

from povid.fault import Fault
from povid.files import files_in, remove, sync
from povid.internals import cluster_environment, correct_logged_step, script_launcher
from povid.run.identity import Identity

log = logging.getLogger(__name__)

NAME = re.compile(r"step_(\d{8})\.([0-9a-f]{8})\.ckpt")


class CheckpointSettings(BaseModel):
    """How often a stage is saved: every so many optimiser steps, every so many minutes, or both; null disables either.

    ``keep``: how many checkpoints stay on disk while a stage trains; all are removed when it is finished.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    every_steps: Annotated[int, Field(ge=1)] | None = None
    every_minutes: Annotated[float, Field(ge=0)] | None = 1.0
    keep: Annotated[int, Field(ge=1)] = 2


class Stopped(BaseException):
    """The run received SIGTERM or the cluster's requeue signal, saved and stopped. Not an error."""


class Checkpoints(L.Callback):
    """Saves a stage as the settings say and on SIGTERM; at the end of a step, never inside one.

    On a SLURM cluster (``plugins`` of the trainer: SLURMEnvironment) the requeue signal saves and requeues the job.

    Args:
        folder: for the checkpoints.
        settings: when to save, and how many checkpoints to keep.
        metrics: the callback that writes metrics.csv, which is forced to disk before a checkpoint that includes its
            rows; it precedes this one in the trainer's list.
        identity: that of the stage; a checkpoint with another is refused.
    """

    def __init__(
        self, folder: Path, settings: CheckpointSettings, metrics: Any = None, identity: Identity | None = None
    ) -> None:
        self.folder, self.settings, self.metrics, self.identity = folder, settings, metrics, identity
        self.saved_step, self.saved_at = 0, 0.0
        self.waiting: int | None = None  # the signal (0: none) of a checkpoint deferred to the end of the epoch
        self.signal: int | None = None
        self.requeue: int | None = None
        self.random: list[dict[str, Any]] = []

    # --- saving -----------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.saved_step, self.saved_at = trainer.global_step, time.monotonic()
        self._listen(trainer)
        if self.random:  # last, to discard the draws made while loading
            set_random_state(self.random[trainer.global_rank])
        elif trainer.global_rank:
            torch.manual_seed(torch.initial_seed() + trainer.global_rank)  # different dropout on each device

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        correct_logged_step(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step == self.saved_step:  # in the middle of an accumulation, or saved already
            return
        due, received = self._due(trainer), self.signal or 0
        if trainer.world_size > 1:  # one process's clock or signal decides for all
            both = torch.tensor([int(due), received], device=trainer.strategy.root_device)
            torch.distributed.all_reduce(both, torch.distributed.ReduceOp.MAX)
            due, received = bool(both[0]), int(both[1])
        if not (due or received):
            return
        if trainer.is_last_batch:  # Lightning miscounts epochs after a checkpoint between an epoch's last batch and end
            self.waiting = received
        else:
            self._act(trainer, received)

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.waiting is not None:
            received, self.waiting = self.waiting, None
            self._act(trainer, received)

    def _act(self, trainer: L.Trainer, received: int) -> None:
        self.save(trainer)
        if received:
            self._leave(trainer, received)

    def on_save_checkpoint(self, trainer: Any, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        states: list[Any] = [random_state()]
        if trainer.world_size > 1:
            states = [None] * trainer.world_size
            torch.distributed.all_gather_object(states, random_state())
        checkpoint["random"], checkpoint["batch_size"] = states, trainer.datamodule.batch_size
        if self.identity is not None:
            checkpoint["identity"] = self.identity.record()

    def on_load_checkpoint(self, trainer: Any, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.identity is not None:
            cure = "restore that to resume, or start in another folder"
            self.identity.check(checkpoint.get("identity"), f"a checkpoint in {self.folder}", cure)
        self.random = checkpoint["random"]
        if len(self.random) != trainer.world_size:
            raise Fault(
                f"{self.folder} was written by {len(self.random)} devices and this run has "
                f"{trainer.world_size}, which would give different batches; use as many devices as before"
            )
        if checkpoint["batch_size"] != trainer.datamodule.batch_size:
            raise Fault(
                f"{self.folder} was written with batch size {checkpoint['batch_size']} and this run uses "
                f"{trainer.datamodule.batch_size}; set stages.N.batch_size={checkpoint['batch_size']}"
            )

    def save(self, trainer: L.Trainer) -> None:
        """Write a checkpoint of the step that has just ended and remove the oldest."""
        if self.metrics is not None and trainer.is_global_zero:
            self.metrics.force()
        draft = self.folder / ".draft.part"
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove(draft)
        trainer.save_checkpoint(draft)
        if trainer.is_global_zero:
            for file in files_in(draft):
                sync(file)
            place = self.folder / f"step_{trainer.global_step:08d}.{checksum(draft):08x}.ckpt"
            os.replace(draft, place)
            sync(self.folder)
            for old in checkpoints(self.folder)[self.settings.keep :]:
                remove(old)
        self.saved_step, self.saved_at = trainer.global_step, time.monotonic()

    def _due(self, trainer: L.Trainer) -> bool:
        steps, minutes = self.settings.every_steps, self.settings.every_minutes
        return bool(
            (steps and trainer.global_step % steps == 0)
            or (minutes is not None and time.monotonic() - self.saved_at >= 60 * minutes)
        )

    # --- signals ----------------------------------------------------------------------------------------------------

    def _listen(self, trainer: L.Trainer) -> None:
        """Take SIGTERM and the requeue signal over from Lightning, whose handlers save in the middle of a step."""
        environment = cluster_environment(trainer)
        launcher = script_launcher(trainer)

        def note(number: int, frame: FrameType | None) -> None:
            if self.signal is None and launcher is not None:
                launcher.kill(number)  # forward it to the processes that this one started
            self.signal = number

        numbers = [signal.SIGTERM]
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            self.requeue = environment.requeue_signal or signal.SIGUSR1
            numbers.append(self.requeue)
        for number in numbers:
            signal.signal(number, note)  # Lightning restores the previous handlers when the fit ends

    def _leave(self, trainer: L.Trainer, number: int) -> None:
        name = signal.Signals(number).name
        if number == self.requeue and trainer.is_global_zero:
            array = os.environ.get("SLURM_ARRAY_JOB_ID")
            job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]
            subprocess.run(["scontrol", "requeue", job], check=True)
            raise Stopped(f"{name}: saved after step {trainer.global_step} and requeued as job {job}")
        raise Stopped(f"{name}: saved after step {trainer.global_step} in {self.folder}; resume with resume=latest")


# --- files -----------------------------------------------------------------------------------------------------------


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, intact or not, newest first."""
    return sorted((file for file in folder.glob("*.ckpt") if NAME.fullmatch(file.name)), reverse=True)


def step_of(file: Path) -> int:
    """The number of optimiser steps before a checkpoint."""
    return int(NAME.fullmatch(file.name)[1])


def batch_size_of(file: Path | None) -> int | None:
    """The batch size stored in a checkpoint; None without a checkpoint or for one of DeepSpeed's folders."""
    if file is None or file.is_dir():
        return None
    return torch.load(file, map_location="cpu", mmap=True, weights_only=True)["batch_size"]


def identity_of(file: Path) -> dict[str, Any] | None:
    """The identity under which a checkpoint was written; None in one of an earlier version."""
    return torch.load(file, map_location="cpu", mmap=True, weights_only=True).get("identity")


def newest(folder: Path) -> Path | None:
    """The newest intact checkpoint; damaged ones are logged and left in place."""
    for file in checkpoints(folder):
        found = checksum(file)
        if found == int(NAME.fullmatch(file.name)[2], 16):
            return file
        log.warning("%s is damaged (checksum %08x); falling back to the checkpoint before it", file, found)
    return None


def checksum(place: Path) -> int:
    """CRC-32 of a file, or of all files in a folder (which DeepSpeed writes)."""
    value = 0
    for file in files_in(place):
        with file.open("rb") as source:
            while block := source.read(2**22):
                value = zlib.crc32(block, value)
    return value


# --- random generators -----------------------------------------------------------------------------------------------


def random_state() -> dict[str, Any]:
    """The states of this process's random generators, in plain containers and tensors."""
    numpy_state: Any = np.random.get_state()
    kind, keys, *rest = numpy_state
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restore what :func:`random_state` returned."""
    random.setstate(_tuples(state["python"]))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value
