"""Where numbers go while a stage trains: metrics.csv always, W&B where it is wanted; both go on where they stopped."""

from __future__ import annotations

import csv
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only


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
            with self.file.open("rb") as written:
                os.fsync(written.fileno())

    def _begin(self) -> None:
        """The head, and the rows of an earlier attempt that still hold."""
        rows = []
        if self.start and self.file.exists():
            with self.file.open(newline="", encoding="utf-8") as source:
                rows = [row for row in csv.DictReader(source) if row["step"] and int(row["step"]) < self.start]
        self.file.parent.mkdir(parents=True, exist_ok=True)
        draft = self.file.with_name(f".{self.file.name}.part")
        with draft.open("w", newline="", encoding="utf-8") as sink:
            writer = csv.DictWriter(sink, self.columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(draft, self.file)


def wandb_logger(
    folder: Path,
    job: str,
    *,
    project: str,
    entity: str | None,
    mode: str,
    tags: Sequence[str],
    config: Mapping[str, Any],
) -> WandbLogger:
    """The W&B run of one job (``stage_1``, ``stage_2``, ``evaluate``) of a run folder, in the group of its sweep.

    Its id lies in ``folder/wandb_ids/JOB``, so that a resumed job goes on in the same W&B run, offline too.
    """
    place = folder / "wandb_ids" / job
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        draft = place.with_name(f".{job}.part")
        draft.write_text(secrets.token_hex(4), encoding="utf-8")
        os.replace(draft, place)
    sweep = folder.parent.name if (folder.parent / "multirun.yaml").exists() else folder.name
    return WandbLogger(
        project=project,
        entity=entity,
        name=f"{folder.name}-{job}",
        id=place.read_text(encoding="utf-8"),
        resume="allow",
        group=sweep,
        job_type=job,
        save_dir=str(folder),
        mode=wandb_mode(mode),
        tags=list(tags),
        config=dict(config),
    )


def wandb_mode(mode: str) -> str:
    """``auto`` is online for who has logged in (key in the environment or in netrc), offline for everybody else."""
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    if mode != "auto":
        return mode
    import wandb

    return "online" if wandb.api.api_key else "offline"


def close(loggers: Sequence[WandbLogger], status: str = "success") -> None:
    """End W&B runs here: under a sweep the next job would otherwise go on in the same one."""
    for logger in loggers:
        if rank_zero_only.rank == 0:
            import wandb

            logger.finalize(status)
            wandb.finish(exit_code=0 if status == "success" else 1)
