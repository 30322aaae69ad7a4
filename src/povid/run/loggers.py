"""Where numbers go while a stage trains: metrics.csv always, and whatever loggers are configured."""

from __future__ import annotations

import csv
import logging
import os
import pkgutil
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from povid import files
from povid.fault import Fault
from povid.report import dashboards
from povid.run.build import accepted, make
from povid.run.settings import Settings

log = logging.getLogger(__name__)


class MetricsFile(L.Callback):
    """Writes ``epoch, step`` and the training metrics, in order of their names, to a CSV file.

    ``step`` counts optimiser steps from 0. Rows of steps from ``start`` on, which an interrupted run had written after
    its last checkpoint, are dropped: the steps are done again. A callback and no logger of Lightning's, since a logger
    hears of a step only after the checkpoint that claims it.
    """

    def __init__(self, file: Path, start: int = 0) -> None:
        self.file, self.start, self.last = file, start, start - 1
        self.columns: list[str] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        step = trainer.global_step - 1
        if not trainer.is_global_zero or step <= self.last or trainer.global_step % trainer.log_every_n_steps:
            return
        row = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("train/")}
        if not self.columns:
            self.columns = ["epoch", "step", *sorted(row)]
            self._begin()
        with self.file.open("a", newline="", encoding="utf-8") as sink:
            csv.DictWriter(sink, self.columns, extrasaction="ignore").writerow(
                {**row, "epoch": trainer.current_epoch, "step": step}
            )
        self.last = step

    def force(self) -> None:
        """Force what is written to disk."""
        if self.file.exists():
            files.sync(self.file)

    def _begin(self) -> None:
        """The head, and the rows of an earlier attempt that still hold."""
        rows = []
        if self.start and self.file.exists():
            try:
                with self.file.open(newline="", encoding="utf-8") as source:
                    rows = [row for row in csv.DictReader(source) if row["step"] and int(row["step"]) < self.start]
            except (ValueError, KeyError, TypeError, csv.Error) as error:
                raise Fault(
                    f"{self.file} is damaged ({error}); restore it from a copy, or move it away to resume without the "
                    f"metrics of the first {self.start} steps"
                ) from None
        with files.draft(self.file) as draft, draft.open("w", newline="", encoding="utf-8") as sink:
            writer = csv.DictWriter(sink, self.columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)


@dataclass(frozen=True)
class RunContext:
    """What a logger may want to know of a run; ``job`` is stage_1, stage_2 or evaluate, ``group`` the sweep's name."""

    folder: Path
    job: str
    group: str
    tags: tuple[str, ...]
    config: Mapping[str, Any]

    @classmethod
    def of(cls, settings: Settings, folder: Path, job: str) -> RunContext:
        sweep = folder.parent.name if (folder.parent / "multirun.yaml").exists() else folder.name
        tags = (settings.plain.row, settings.objective, settings.model.name, settings.data.name)
        return cls(folder, job, sweep, tags, settings.tree)


def make_loggers(nodes: Mapping[str, Mapping[str, Any]], run: RunContext) -> list[Logger]:
    """The configured loggers for one job of a run.

    A logger that takes ``run`` is given the context; one that takes ``save_dir`` writes below the job's folder unless
    its configuration names another.

    Raises:
        Fault: a package that a logger needs is not installed.
    """
    loggers = []
    for name, node in nodes.items():
        offered = {"run": run, "save_dir": str(run.folder / run.job)}
        taken = accepted(pkgutil.resolve_name(node["_target_"]), offered)
        try:
            loggers.append(make(node, **{key: value for key, value in taken.items() if key not in node}))
        except ImportError as error:
            raise Fault(f"logger.{name}: {error}; install what it needs or choose another logger") from None
    return loggers


def wandb_logger(run: RunContext, project: str = "povid", entity: str | None = None, mode: str = "auto") -> WandbLogger:
    """The W&B run of one job of a run folder, in the group of its sweep.

    Its id lies in ``folder/wandb_ids/JOB``, so that a resumed job continues the same W&B run, offline too.

    Args:
        run: whose job it is.
        project, entity: where it is filed.
        mode: online, offline, disabled, or auto: online if logged in, else offline.
    """
    place = run.folder / "wandb_ids" / run.job
    if not place.exists():
        files.write_text(place, secrets.token_hex(4))
    arguments = {
        "project": project,
        "entity": entity,
        "name": f"{run.folder.name}-{run.job}",
        "id": place.read_text(encoding="utf-8"),
        "resume": "allow",
        "group": run.group,
        "job_type": run.job,
        "save_dir": str(run.folder),
        "tags": list(run.tags),
        "config": dict(run.config),
    }
    logger = WandbLogger(**arguments, mode=(chosen := wandb_mode(mode)))
    if chosen not in ("online", "shared"):
        return logger
    import wandb

    try:
        _ = logger.experiment  # connects
    except (wandb.errors.Error, OSError) as error:
        log.warning(
            "W&B cannot be reached (%s); this run is logged offline below %s/wandb: upload it later with wandb sync",
            str(error).splitlines()[0],
            run.folder,
        )
        wandb.teardown()  # of the connection that failed
        os.environ["WANDB_MODE"] = "offline"  # for the other jobs of this process, which would wait as long again
        return WandbLogger(**arguments, mode="offline")
    return logger


def wandb_mode(mode: str) -> str:
    """``auto`` is online for who has logged in (key in the environment or in netrc), offline for everybody else."""
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    if mode != "auto":
        return mode
    import wandb

    return "online" if wandb.api.api_key else "offline"


def show_evaluation(loggers: Sequence[Logger], benchmarks: Mapping[str, Mapping[str, Any]], table: Any) -> None:
    """Benchmark figures in every logger, and the table of captions where a logger can show pictures (W&B)."""
    figures = {
        f"{name}/{key}": value
        for name, scores in benchmarks.items()
        for key, value in scores.items()
        if isinstance(value, (int, float))
    }
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.summary.update(figures)
            if table is not None:
                dashboards.log_table(logger.experiment, table)
        else:
            logger.log_metrics(figures)


def close(loggers: Sequence[Logger], status: str = "success") -> None:
    """End the loggers' runs here: under a sweep the next job would otherwise continue the same W&B run."""
    for logger in loggers:
        if rank_zero_only.rank == 0:
            logger.finalize(status)
            if isinstance(logger, WandbLogger):
                import wandb

                wandb.finish(exit_code=0 if status == "success" else 1)
