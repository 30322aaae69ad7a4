"""Checks that stop a run early: losses that are not finite, records that cannot be used, a full disk."""

from __future__ import annotations

import errno
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch

from povid.fault import Fault
from povid.preferences.check import Report, check
from povid.preferences.triple import Triple
from povid.run.checking import Checks
from povid.run.checkpoint import newest
from povid.run.signals import Stopped

log = logging.getLogger(__name__)

LISTED = 20  # unusable records that a message names


class FiniteLoss(L.Callback):
    """Stops a stage at a loss that is NaN or infinite, naming the step, its records and the last good checkpoint.

    Losses are checked when the metrics are fetched: at a logging step, before a checkpoint and at the end, so that the
    host waits for the device no more often than for the metrics.
    """

    def __init__(self, stage: int, checkpoints: Path) -> None:
        self.stage, self.checkpoints = stage, checkpoints
        self.step = 1
        self.unchecked: list[tuple[int, list[str]]] = []

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.step = trainer.global_step + 1

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.unchecked.append((self.step, batch.names))
        if module.logs_now:
            self.settle(trainer, module)

    def on_save_checkpoint(self, trainer: L.Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        self.settle(trainer, module)
        for name, weights in checkpoint["state_dict"].items():
            if not torch.isfinite(weights).all():
                raise Fault(
                    f"stage {self.stage}: after step {trainer.global_step} {name} holds NaN or infinite values "
                    f"though every loss was finite; lower stages.{self.stage}.lr. {self._good()}"
                )

    def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
        self.settle(trainer, module)

    def settle(self, trainer: L.Trainer, module: Any) -> None:
        """Check the losses since the last check: means over the devices, so that all of them stop together."""
        unchecked, self.unchecked = self.unchecked, []
        module.settle()
        losses = module.window.values.get("loss", [])[-len(unchecked) :] if unchecked else []
        for (step, names), value in zip(unchecked, losses):
            if not math.isfinite(value):
                self._stop(trainer, step, names, value)

    def _stop(self, trainer: L.Trainer, step: int, names: list[str], value: float) -> None:
        if trainer.world_size > 1:
            shares: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(shares, names)
            names = [name for share in shares for name in share]
            if not trainer.is_global_zero:
                raise Stopped("the first process reports the error")
        raise Fault(
            f"stage {self.stage}: the loss of step {step} is {value}; its records are "
            f"{', '.join(map(repr, names))}; check them and stages.{self.stage}.lr. {self._good()}"
        )

    def _good(self) -> str:
        file = newest(self.checkpoints)
        return f"The last good checkpoint is {file}" if file else "There is no earlier checkpoint"


class DataCheck(L.Callback):
    """Checks every record in processes of its own while the first epoch trains; stops the stage if some are unusable.

    An epoch that is trained to its end does not end before the check.
    """

    def __init__(
        self, triples: Sequence[Triple], source: str, check: Callable[..., Report] = check, processes: int = 1
    ) -> None:
        self.triples, self.source, self.check, self.processes = triples, source, check, processes
        self.checks: Checks | None = None

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.is_global_zero and trainer.current_epoch == 0 and self.checks is None:
            self.checks = Checks(self.triples, self.check, self.processes)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if self.checks is not None and self.checks.running:
            report = self.checks.report(complete=trainer.fit_loop.epoch_loop.batch_progress.is_last_batch)
            if report is not None:
                self.end()
                refuse(report, self.source)
                self._say(report)

    def _say(self, report: Report) -> None:
        if report.checked == report.records:
            log.info("checked all %d records: every one can be used", report.checked)
        else:
            log.warning(
                "%d of %d records are not checked, since a process that checked them died, most likely because memory "
                "ran out; `python -m povid.preferences check` checks them without a run",
                report.records - report.checked,
                report.records,
            )

    def end(self) -> None:
        if self.checks is not None:
            self.checks.end()

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        self.end()

    def teardown(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        self.end()


def refuse(report: Report, source: str) -> None:
    """Raise a Fault that lists the records that a check found unusable, if there are any."""
    if report.sound:
        return
    listed = [finding.text for finding in report.findings[:LISTED]]
    more = len(report.findings) - len(listed)
    rest = f"\n  - and {more} more" if more else ""
    found = "a record that cannot be used" if len(report.bad) == 1 else f"{len(report.bad)} records that cannot be used"
    raise Fault(
        f"{source} holds {found} (of {report.checked} checked); fix or remove them, or skip and count such records "
        "with data.skip_bad=true:\n  - " + "\n  - ".join(listed) + rest
    )


@contextmanager
def explain_full_disk(folder: Path) -> Iterator[None]:
    """Turn the errors that libraries raise on a full disk into one sentence."""
    try:
        yield
    except Fault:
        raise
    except Exception as error:
        if not _disk_full(error):
            raise
        raise Fault(
            f"there is no space left to write in {folder}; free some and resume with resume=latest: finished "
            "stages, checkpoints and answers are kept"
        ) from error


def _disk_full(error: BaseException | None) -> bool:
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        if any(
            sign in str(error)
            for sign in (
                "No space left on device",
                "PytorchStreamWriter failed writing",
                "File too large",
                "Disk quota exceeded",
            )
        ):
            return True
        error = error.__cause__ or error.__context__
    return False
