"""Checks that stop a run early: losses that are not finite, records that cannot be used, a full disk."""

from __future__ import annotations

import errno
import logging
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import lightning as L
import torch

from povid.fault import Fault
from povid.preferences.check import Report, check
from povid.preferences.triple import Triple
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

    The first epoch does not end before the check. The processes give way to all others.
    """

    def __init__(
        self, triples: Sequence[Triple], source: str, check: Callable[..., Report] = check, processes: int = 1
    ) -> None:
        self.triples, self.source, self.check, self.processes = triples, source, check, processes
        self.running: list[tuple[Any, Connection]] = []
        self.reports: dict[int, Report | None] = {}

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not trainer.is_global_zero or trainer.current_epoch or self.running or self.reports:
            return
        fork = multiprocessing.get_context("fork")  # the records are there already
        share = -(-len(self.triples) // min(self.processes, len(self.triples)))
        for start in range(0, len(self.triples), share):
            receiver, sender = fork.Pipe(duplex=False)
            part = self.triples[start : start + share]
            process = fork.Process(target=_check, args=(self.check, part, sender), name="data-check", daemon=True)
            process.start()
            sender.close()
            self.running.append((process, receiver))

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if self.running:
            last = trainer.current_epoch == 0 and trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
            self.collect(wait=last)

    def teardown(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        self.end()

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        self.end()

    def collect(self, wait: bool = False) -> None:
        """Take the reports that are there, or all of them; with the last one, say what was found.

        Raises:
            Fault: some records cannot be used.
        """
        for number, (_, receiver) in enumerate(self.running):
            if number not in self.reports and (wait or receiver.poll()):
                try:
                    self.reports[number] = receiver.recv()
                except EOFError:
                    self.reports[number] = None
        if len(self.reports) < len(self.running):
            return
        self.end()
        reports = [report for _, report in sorted(self.reports.items()) if report is not None]
        checked = sum(report.checked for report in reports)
        findings = [finding for report in reports for finding in report.findings]
        refuse(Report(len(self.triples), checked, findings), self.source)
        if checked < len(self.triples):
            log.warning(
                "a process that checked records died, so that %d of %d were not checked; python -m povid.preferences "
                "check looks at them again",
                len(self.triples) - checked,
                len(self.triples),
            )
        else:
            log.info("checked all %d records: every one can be used", checked)

    def end(self) -> None:
        """End the processes."""
        for process, receiver in self.running:
            receiver.close()
            process.kill()
            process.join()
        self.running = []


def _check(check: Callable[..., Report], triples: Sequence[Triple], sender: Connection) -> None:
    """Check records in this process, which ends with the one that started it."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the run's own decides what it means
    os.nice(19)
    torch.set_num_threads(1)

    def follow() -> None:
        wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    sender.send(check(triples))


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
