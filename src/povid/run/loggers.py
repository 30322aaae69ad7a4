"""Where metrics are written: metrics.csv, and the configured loggers."""

from __future__ import annotations

import csv
import pkgutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger

from povid import files
from povid.fault import Fault
from povid.run.build import accepted, make
from povid.run.context import RunContext
from povid.run.identity import flat
from povid.run.processes import first
from povid.run.wandb_run import WandbRun
from povid.run.watch import numbers


class Metrics(L.Callback):
    """Writes what a stage measures at its logging steps: to metrics.csv, and to every logger.

    A row holds the means over the steps since the row before. ``step`` counts optimiser steps from 0. What another
    callback logs under ``train/`` is a column too. Speed and memory, which a resumed run does not repeat, are given to
    loggers alone. Rows from step ``start`` on, which an interrupted run wrote after its last checkpoint, are dropped
    because these steps are repeated. This is a callback and not a Lightning logger because a logger receives a step's
    metrics only after the checkpoint of that step.
    """

    def __init__(self, file: Path, start: int = 0) -> None:
        self.file, self.start = file, start
        self.columns: list[str] = []
        self.since, self.examples = 0.0, 0

    def on_train_batch_start(self, trainer: Any, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        self.since = self.since or time.monotonic()
        self.examples += batch.pairs.examples * trainer.world_size

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        if not module.logs_now:
            return
        others = {name: value for name, value in trainer.callback_metrics.items() if name.startswith("train/")}
        module.window.add({name.removeprefix("train/"): value for name, value in others.items()})
        module.settle()
        means = module.window.take() | module.rates
        speed = self._speed(means)
        module.latest = means | speed
        module.log_dict(means, logger=False)  # for callbacks that watch a metric
        if not trainer.is_global_zero:
            return
        step = trainer.global_step - 1
        self._write({"epoch": trainer.current_epoch, "step": step}, means)
        ours = {name: value for name, value in (means | speed).items() if f"train/{name}" not in others}
        for logger in trainer.loggers:  # those of other callbacks receive from Lightning
            logger.log_metrics(ours | {"epoch": trainer.current_epoch}, step=step)
            logger.save()

    def _speed(self, means: Mapping[str, float]) -> dict[str, float]:
        """Examples and tokens a second, over all processes and all that happened since the last row; GiB in use."""
        now = time.monotonic()
        rate = self.examples / max(now - self.since, 1e-9)
        self.since, self.examples = now, 0
        found = {"examples_per_second": rate, "tokens_per_second": rate * means["tokens"]}
        if torch.cuda.is_available():
            found["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return found

    def _write(self, place: Mapping[str, int], means: Mapping[str, float]) -> None:
        if not self.columns:
            self.columns = ["epoch", "step", *sorted(means)]
            self._begin()
        with self.file.open("a", newline="", encoding="utf-8") as sink:
            csv.DictWriter(sink, self.columns, extrasaction="ignore").writerow({**means, **place})

    def force(self) -> None:
        """Force the written rows to disk."""
        if self.file.exists():
            files.sync(self.file)

    def _begin(self) -> None:
        """Write the header, and the rows of an earlier attempt that are still valid."""
        rows = []
        if self.start and self.file.exists():
            try:
                with self.file.open(newline="", encoding="utf-8") as source:
                    rows = [row for row in csv.DictReader(source) if row["step"] and int(row["step"]) < self.start]
                rows = [numbers(row) for row in rows]  # later ones may be torn, and are written again
            except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
                raise Fault(
                    f"{self.file} is damaged ({error}); restore it from a copy, or move it away to resume without the "
                    f"metrics of the first {self.start} steps"
                ) from None
        with files.draft(self.file) as draft, draft.open("w", newline="", encoding="utf-8") as sink:
            writer = csv.DictWriter(sink, self.columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)


def make_loggers(nodes: Mapping[str, Mapping[str, Any]], run: RunContext) -> list[Logger]:
    """The configured loggers for one job of a run.

    A logger with a parameter ``run`` receives the context; one with ``save_dir`` writes below the job's folder unless
    its configuration sets another.

    Raises:
        Fault: a package that a logger needs is not installed.
    """
    loggers = []
    for name, node in nodes.items():
        offered = {"run": run, "save_dir": str(run.folder / run.job)}
        taken = accepted(_target(node), offered)
        try:
            loggers.append(make(node, **{key: value for key, value in taken.items() if key not in node}))
        except ImportError as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise Fault(f"logger.{name}: {reason}; install what it needs or choose another logger") from None
    return loggers


def require_loggers(nodes: Mapping[str, Mapping[str, Any]], run: RunContext) -> None:
    """Raise the Fault of a logger that cannot be made before anything is loaded; nothing is written.

    Loggers that take ``run`` file the run when they are made, so they are left out.
    """
    make_loggers({n: node for n, node in nodes.items() if not accepted(_target(node), {"run": run})}, run)


def _target(node: Mapping[str, Any]) -> Any:
    return pkgutil.resolve_name(node["_target_"])


def show_results(loggers: Sequence[Logger], results: Mapping[str, Any]) -> None:
    """Give every score in results.json to every logger: ``eval/BENCHMARK/SCORE``, with breakdowns one level deeper."""
    figures = {
        f"eval/{key.replace('.', '/')}": value
        for key, value in flat(results["benchmarks"])
        if isinstance(value, (int, float)) and not isinstance(value, bool) and ".decoding." not in key
    }
    for logger in loggers:
        if isinstance(logger, WandbRun):
            logger.log_results(results, figures)
            logger.log_files(results)
        else:
            logger.log_metrics(figures)
            logger.save()


def close(loggers: Sequence[Logger], status: str = "success") -> None:
    """Finish a job's loggers; the W&B run stays open for the next job, until :func:`povid.run.wandb_run.finish`."""
    if first():
        for logger in loggers:
            logger.finalize(status)
