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
from povid.internals import begin_next_epoch, correct_logged_step, validates_next
from povid.run.identity import Identity
from povid.run.signals import Signals

log = logging.getLogger(__name__)

NAME = re.compile(r"step_(\d{8})\.([0-9a-f]{8})\.ckpt")


class CheckpointSettings(BaseModel):
    """How often a stage is saved: every so many optimiser steps, every so many minutes, or both; null disables either.

    ``keep``: how many checkpoints stay on disk while a stage trains; all are removed when it is finished.

    ``best``: a metric of the validation or of a callback such as the probe; the adapter with which it was best is kept
    beside the last one, and the run continues with it. null keeps the last one alone. ``guard``: a metric that must not
    fall by more than ``max_fall`` from its value at the start, or an adapter is not kept; null for none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    every_steps: Annotated[int, Field(ge=1)] | None = None
    every_minutes: Annotated[float, Field(ge=0)] | None = 1.0
    keep: Annotated[int, Field(ge=1)] = 2
    best: Annotated[str, Field(min_length=1)] | None = None
    guard: Annotated[str, Field(min_length=1)] | None = "probe/chair/coverage"
    max_fall: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 10.0


class Checkpoints(L.Callback):
    """Saves a stage as the settings say and when a signal tells the run to stop; at the end of a step, never inside.

    Args:
        folder: for the checkpoints.
        settings: when to save, and how many checkpoints to keep.
        signals: what the run does with signals.
        metrics: the callback that writes metrics.csv, which is forced to disk before a checkpoint that includes its
            rows; it precedes this one in the trainer's list.
        identity: that of the stage; a checkpoint with another is refused.
    """

    def __init__(
        self,
        folder: Path,
        settings: CheckpointSettings,
        signals: Signals,
        metrics: Any = None,
        identity: Identity | None = None,
    ) -> None:
        self.folder, self.settings, self.signals = folder, settings, signals
        self.metrics, self.identity = metrics, identity
        self.saved_step, self.saved_at = 0, 0.0
        self.in_step = False
        self.waiting: int | None = None  # the signal (0: none) of a checkpoint deferred to the end of the epoch
        self.random: list[dict[str, Any]] = []

    # --- saving -----------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        begin_next_epoch(trainer)
        self.saved_step, self.saved_at = trainer.global_step, time.monotonic()
        self.signals.training = True
        self.signals.listen()
        if self.random:  # last, to discard the draws made while loading
            set_random_state(self.random[trainer.global_rank])
        elif trainer.global_rank:
            torch.manual_seed(torch.initial_seed() + trainer.global_rank)  # different dropout on each device

    def on_train_batch_start(self, trainer: Any, module: L.LightningModule, *_: Any) -> None:
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
        due, received = self._due(trainer), self.signals.told or 0
        if trainer.world_size > 1:  # one process's clock or signal decides for all
            both = torch.tensor([int(due), received], device=trainer.strategy.root_device)
            torch.distributed.all_reduce(both, torch.distributed.ReduceOp.MAX)
            due, received = bool(both[0]), int(both[1])
        if not (due or received):
            return
        # Lightning miscounts epochs after a checkpoint between an epoch's last batch and end, and a run that resumes
        # from one between a step and its validation leaves that validation out.
        if trainer.is_last_batch or validates_next(trainer):
            self.waiting = received
        else:
            self._act(trainer, received)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not trainer.is_last_batch:
            self._act_late(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._act_late(trainer)

    def _act_late(self, trainer: L.Trainer) -> None:
        if self.waiting is not None:
            received, self.waiting = self.waiting, None
            self._act(trainer, received)

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        """Save what was learnt before a loader process died; on several devices the others cannot join in that."""
        if (
            loader_died(exception)
            and not self.in_step
            and not trainer.validating  # a resumed run would leave out the rest of the validation
            and trainer.world_size == 1
            and trainer.global_step > self.saved_step
        ):
            self.save(trainer)

    def _act(self, trainer: L.Trainer, received: int) -> None:
        self.save(trainer)
        if received:
            self.signals.stop(received, f"saved after step {trainer.global_step}")

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
        try:
            trainer.save_checkpoint(draft)
            if trainer.is_global_zero:
                for file in files_in(draft):
                    sync(file)
        except BaseException:
            if trainer.is_global_zero:
                remove(draft)  # it may be what fills the disk
            raise
        if trainer.is_global_zero:
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
