"""The best adapter of a stage by a metric, kept beside the last one."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L

from povid import files
from povid.fault import Fault
from povid.model.adapters import adapter_digest
from povid.run.checkpoint import CheckpointSettings
from povid.run.processes import first
from povid.run.watch import Watcher
from povid.training.sharding import whole_adapter

log = logging.getLogger(__name__)


class BestAdapter(L.Callback):
    """Keeps the adapter of the step at which ``settings.best`` was best, if the guard metric allows it.

    The guard metric must not be more than ``settings.max_fall`` below its value at the start; it is measured at every
    step whose adapter would be kept. The adapter before the first step is not a candidate. Adapters that an earlier
    best one left behind stay until no checkpoint names them any more, so that a resumed stage finds what it knows.

    Args:
        folder: for the adapters, ``step_N`` each.
        watchers: what measures; they precede this callback in the trainer's list.
        start: the guard metric before the first stage; None for its value before this one.
    """

    def __init__(
        self, folder: Path, settings: CheckpointSettings, watchers: Sequence[Watcher], start: float | None = None
    ) -> None:
        self.folder, self.settings, self.start = folder, settings, start
        self.watchers = watchers
        self.chooser = next(watcher for watcher in watchers if settings.best in watcher.metrics)
        self.guard = next((watcher for watcher in watchers if settings.guard in watcher.metrics), None)
        self.kept: dict[str, Any] | None = None
        self.refused = 0  # candidates that the guard refused
        self.seen = 0
        self.named: deque[int] = deque(maxlen=settings.keep + 1)  # steps that checkpoints on disk may name

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.kept is None and self.seen == 0 and trainer.is_global_zero:  # nothing is resumed
            files.remove(self.folder)

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        self._note_start()

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        self._consider(trainer, module)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._consider(trainer, module)

    def _note_start(self) -> None:
        if self.guard is not None and self.start is None and self.guard.latest is not None:
            self.start = self.guard.latest[1][self.settings.guard]

    def _consider(self, trainer: Any, module: Any) -> None:
        step, best = trainer.global_step, self.settings.best
        if self.chooser.latest is None or self.chooser.latest[0] != step or step <= self.seen:
            return
        self.seen = step
        value = self.chooser.latest[1][best]
        sign = 1 if self.chooser.metrics[best] == "high" else -1
        if not math.isfinite(value) or (self.kept is not None and sign * value <= sign * self.kept["value"]):
            return
        if self.guard is not None:
            if self.guard.latest is None or self.guard.latest[0] != step:
                self.guard.measure(trainer, module)
            if self.guard.latest[1][self.settings.guard] < self.start - self.settings.max_fall:
                self.refused += 1
                return
        weights, saved = whole_adapter(module.policy), None
        if trainer.is_global_zero:
            with files.draft(self._place(step)) as draft:
                module.policy.save_adapter(draft, weights)
            saved = adapter_digest(self._place(step))
        self.kept = {"step": step, "value": value, "measured": measured(self.watchers, step), "adapter_digest": saved}
        self._tidy(trainer)

    def _place(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"

    def _tidy(self, trainer: L.Trainer) -> None:
        if trainer.is_global_zero and len(self.named) == self.named.maxlen:
            wanted = {self._place(step) for step in (*self.named, self.kept["step"])}
            for place in set(self.folder.glob("step_*")) - wanted:
                files.remove(place)

    def state_dict(self) -> dict[str, Any]:
        self.named.append(self.kept["step"] if self.kept else 0)
        return {"start": self.start, "kept": self.kept, "refused": self.refused, "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start, self.kept, self.refused, self.seen = (state[k] for k in ("start", "kept", "refused", "seen"))
        if first() and self.kept is not None:
            self._check()

    def _check(self) -> None:
        """Raise a Fault unless the best adapter is the one that was kept: no later checkpoint can restore it."""
        place = self._place(self.kept["step"])
        if not place.is_dir() or adapter_digest(place) != self.kept["adapter_digest"]:
            raise Fault(
                f"{place}, the best adapter so far, {'was changed' if place.is_dir() else 'is missing'} since the last "
                "checkpoint; put it back to resume, or start in another folder"
            )

    @property
    def adapter(self) -> Path | None:
        """The folder of the best adapter; None if none was kept."""
        return self._place(self.kept["step"]) if self.kept else None

    def record(self) -> dict[str, Any]:
        """Which adapter the stage hands on, and why, for stage.json; a warning if it is not the best."""
        settings = self.settings
        found: dict[str, Any] = {"metric": settings.best, "adapter": "best" if self.kept else "last"}
        if self.kept:
            found |= {"step": self.kept["step"], "value": self.kept["value"]}
        if self.guard is not None:
            found |= {"guard": settings.guard, "start": self.start, "max_fall": settings.max_fall}
        if self.kept is None:
            found["reason"] = (
                f"{settings.guard} was more than {settings.max_fall:g} below its start, {self.start:.1f}, at every "
                f"step that could have been kept ({self.refused})"
                if self.refused
                else f"{settings.best} was not measured after a step of the stage, or was never a finite number"
            )
            log.warning("%s: the last adapter is used, since %s", self.folder.parent, found["reason"])
        return found


def measured(watchers: Sequence[Watcher], step: int) -> dict[str, float]:
    """What was measured after ``step``, by name."""
    latest = [watcher.latest for watcher in watchers if watcher.latest is not None]
    return {name: value for at, values in latest if at == step for name, value in values.items()}
