"""Where metrics are written: metrics.csv, and the configured loggers."""

from __future__ import annotations

import csv
import logging
import os
import pkgutil
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import lightning as L
from lightning.pytorch.loggers import Logger, WandbLogger
from pydantic import AfterValidator

from povid import files
from povid.fault import Fault
from povid.report import dashboards
from povid.run.build import accepted, make
from povid.run.processes import first
from povid.run.settings import Settings

log = logging.getLogger(__name__)


class MetricsFile(L.Callback):
    """Writes ``epoch, step`` and the training metrics, in order of their names, to a CSV file.

    ``step`` counts optimiser steps from 0. Rows from step ``start`` on, which an interrupted run wrote after its last
    checkpoint, are dropped because these steps are repeated. This is a callback and not a Lightning logger because a
    logger receives a step's metrics only after the checkpoint of that step.
    """

    def __init__(self, file: Path, start: int = 0) -> None:
        self.file, self.start, self.last = file, start, start - 1
        self.columns: list[str] = []

    def on_train_batch_end(self, trainer: Any, module: L.LightningModule, *_: Any) -> None:
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
    """A run as loggers see it; ``job`` is stage_1, stage_2 or evaluate, ``group`` the name of its sweep."""

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


def _logged_in(mode: str) -> str:
    """``online`` is for who has logged in: a run would stop at its first stage to ask for a key."""
    if wandb_mode(mode) == "online":
        import wandb

        if not wandb.api.api_key:
            raise ValueError("online needs a login: run `wandb login`, set WANDB_API_KEY, or use auto")
    return mode


Mode = Annotated[Literal["auto", "online", "offline", "disabled"], AfterValidator(_logged_in)]


def wandb_logger(
    run: RunContext, project: str = "povid", entity: str | None = None, mode: Mode = "auto"
) -> WandbLogger:
    """The W&B run of one job of a run folder, in the group of its sweep.

    Its id is stored in ``folder/wandb_ids/JOB``, so that a resumed job continues the same W&B run, also offline.

    Args:
        run: the run and its job.
        project, entity: W&B's project, and the user or team that owns it.
        mode: online, offline, disabled, or auto: online if logged in, else offline.
    """
    place = run.folder / "wandb_ids" / run.job
    if not place.exists():
        files.write_text(place, secrets.token_hex(4))
    arguments: dict[str, Any] = {
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
        os.environ.pop("WANDB_SERVICE", None)  # a service that another process started still holds this run's id
        os.environ["WANDB_MODE"] = "offline"  # for the other jobs of this process, which would wait as long again
        return WandbLogger(**arguments, mode="offline")
    return logger


def wandb_mode(mode: str) -> str:
    """Resolve ``auto``: online if logged in (with a key in the environment or in netrc), else offline."""
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    if mode != "auto":
        return mode
    import wandb

    return "online" if wandb.api.api_key else "offline"


def show_evaluation(loggers: Sequence[Logger], benchmarks: Mapping[str, Mapping[str, Any]], table: Any) -> None:
    """Log benchmark scores to every logger, and the table of captions to those that show pictures (W&B)."""
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
    """Finish the loggers' runs, since the next job of a sweep would otherwise continue the same W&B run."""
    for logger in loggers:
        if first():
            logger.finalize(status)
            if isinstance(logger, WandbLogger):
                import wandb

                wandb.finish(exit_code=0 if status == "success" else 1)
