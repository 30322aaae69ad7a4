"""Checkpoints from which a stage resumes with exactly the losses that it would have had without the interruption.

What the trainer saves (trained weights, optimiser, schedule, position in the epoch) is joined by the states of all
random generators of all processes. A checkpoint is written beside its place, forced to disk and renamed; its name ends
with a checksum, so that a torn or damaged file is recognised and the one before it is used.
"""

from __future__ import annotations

import logging
import os
import random
import re
import signal
import threading
import time
import traceback
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import lightning as L
import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from povid.fault import Fault
from povid.files import files_in, remove, sync
from povid.internals import correct_logged_step, script_launcher
from povid.run.signals import Signals

log = logging.getLogger(__name__)

NAME = re.compile(r"step_(\d{8})\.([0-9a-f]{8})\.ckpt")


class CheckpointSettings(BaseModel):
    """How often a stage is saved: every so many optimiser steps, every so many minutes, or both; null for neither.

    ``keep``: how many checkpoints stay on disk while a stage trains; none stays when it is finished.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    every_steps: Annotated[int, Field(ge=1)] | None = None
    every_minutes: Annotated[float, Field(ge=0)] | None = 1.0
    keep: Annotated[int, Field(ge=1)] = 2


class Checkpoints(L.Callback):
    """Saves a stage as the settings say and when a signal tells the run to stop; at the end of a step, never inside.

    Args:
        folder: where the checkpoints lie.
        signals: what the run does with signals.
        metrics: the file of metrics, forced to disk before a checkpoint claims its rows; it stands before this among
            the callbacks.
    """

    def __init__(self, folder: Path, settings: CheckpointSettings, signals: Signals, metrics: Any = None) -> None:
        self.folder, self.settings, self.signals, self.metrics = folder, settings, signals, metrics
        self.saved_step, self.saved_at = 0, 0.0
        self.in_step = False
        self.waiting: int | None = None  # the signal (0 for none) of a checkpoint put off to the end of the epoch
        self.random: list[dict[str, Any]] = []

    # --- saving -----------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.saved_step, self.saved_at = trainer.global_step, time.monotonic()
        self.signals.launcher = script_launcher(trainer)
        self.signals.training = True
        self.signals.listen()
        if self.random:  # last of all: whatever was drawn while things were loaded is forgotten here
            set_random_state(self.random[trainer.global_rank])
        elif trainer.global_rank:
            torch.manual_seed(torch.initial_seed() + trainer.global_rank)  # dropout differs between devices

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        correct_logged_step(trainer)
        self.in_step = True
        if trainer.datamodule.workers and threading.current_thread() is threading.main_thread():
            # torch's handler would raise in the middle of this step when a loader process dies; without it the loader
            # raises when the next batch is due, and a checkpoint can be written
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        self.in_step = False
        if trainer.global_step == self.saved_step:  # in the middle of an accumulation, or saved already
            return
        due, told = self._due(trainer), self.signals.told or 0
        if trainer.world_size > 1:  # one process's clock or signal decides for all
            both = torch.tensor([int(due), told], device=trainer.strategy.root_device)
            torch.distributed.all_reduce(both, torch.distributed.ReduceOp.MAX)
            due, told = bool(both[0]), int(both[1])
        if not (due or told):
            return
        if trainer.is_last_batch:  # Lightning miscounts epochs after a checkpoint between an epoch's last batch and end
            self.waiting = told
        else:
            self._act(trainer, told)

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.waiting is not None:
            told, self.waiting = self.waiting, None
            self._act(trainer, told)

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        """Save what was learnt before a loader process died; on several devices the others cannot join in that."""
        if (
            loader_died(exception)
            and not self.in_step
            and trainer.world_size == 1
            and trainer.global_step > self.saved_step
        ):
            self.save(trainer)

    def _act(self, trainer: L.Trainer, told: int) -> None:
        self.save(trainer)
        if told:
            self.signals.stop(told, f"saved after step {trainer.global_step}")

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        states: list[Any] = [random_state()]
        if trainer.world_size > 1:
            states = [None] * trainer.world_size
            torch.distributed.all_gather_object(states, random_state())
        checkpoint["random"], checkpoint["batch_size"] = states, trainer.datamodule.batch_size

    def on_load_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.random = checkpoint["random"]
        if len(self.random) != trainer.world_size:
            raise Fault(
                f"{self.folder} was written by {len(self.random)} devices and this run has "
                f"{trainer.world_size}, which would give other batches; use as many devices as before"
            )
        if checkpoint["batch_size"] != trainer.datamodule.batch_size:
            raise Fault(
                f"{self.folder} was written with batches of {checkpoint['batch_size']} and this run has those "
                f"of {trainer.datamodule.batch_size}; set stages.N.batch_size to the former"
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


def loader_died(error: BaseException) -> bool:
    """Whether an error is that of a loader process that ended, as one does that is killed for its memory.

    Either torch says so, or the connection broke over which the process was handing a batch (``_try_get_data`` is what
    receives batches; an error that a living process raised is raised again elsewhere).
    """
    if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid"):
        return True
    receiving = any(frame.f_code.co_name == "_try_get_data" for frame, _ in traceback.walk_tb(error.__traceback__))
    return isinstance(error, (OSError, EOFError)) and receiving


# --- files -----------------------------------------------------------------------------------------------------------


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a folder, the newest first; nothing is said of whether they are whole."""
    return sorted((file for file in folder.glob("*.ckpt") if NAME.fullmatch(file.name)), reverse=True)


def step_of(file: Path) -> int:
    """The number of optimiser steps behind a checkpoint."""
    return int(NAME.fullmatch(file.name)[1])


def batch_size_of(file: Path | None) -> int | None:
    """How many records a batch held where a checkpoint was written; None without one (or in DeepSpeed's folders)."""
    if file is None or file.is_dir():
        return None
    return torch.load(file, map_location="cpu", mmap=True, weights_only=True)["batch_size"]


def newest(folder: Path) -> Path | None:
    """The newest checkpoint that is whole; those that are not are named in the log, and left alone."""
    for file in checkpoints(folder):
        found = checksum(file)
        if found == int(NAME.fullmatch(file.name)[2], 16):
            return file
        log.warning("%s is damaged (checksum %08x); falling back to the checkpoint before it", file, found)
    return None


def checksum(place: Path) -> int:
    """CRC-32 of a file, or of all files of a folder (what DeepSpeed writes)."""
    value = 0
    for file in files_in(place):
        with file.open("rb") as source:
            while block := source.read(2**22):
                value = zlib.crc32(block, value)
    return value


# --- random generators -----------------------------------------------------------------------------------------------


def random_state() -> dict[str, Any]:
    """The states of this process's random generators, in plain containers and tensors."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Undo :func:`random_state`."""
    random.setstate(_tuples(state["python"]))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value
