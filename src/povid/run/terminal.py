"""What a run shows on the terminal: how far a stage is, and what came out."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import BatchesProcessedColumn, CustomBarColumn
from rich.progress import ProgressColumn, Task
from rich.text import Text

from povid.report.runs import read
from povid.report.tables import OWN_WORDS, OWN_WORDS_MEANS, row_of
from povid.run.processes import first
from povid.run.wandb_run import sync_line
from povid.terminal import EVERY, redraws, show, spoken, width

log = logging.getLogger(__name__)

SETTLED = 5  # steps before the first estimate of the time left


# --- progress ---------------------------------------------------------------------------------------------------------


class Pace:
    """The figures of a stage's progress: what was logged last, how fast it is, and how long it may take.

    Metrics are fetched at logging steps alone, so that showing them never makes the host wait for the device.
    """

    def __init__(self) -> None:
        self.step, self.total = 0, math.inf
        self.metrics: dict[str, float] = {}
        self.speed: float | None = None
        self._examples, self._since = 0, 0.0
        self._begin: tuple[int, float] | None = None

    def start(self, trainer: L.Trainer) -> None:
        self.step, self.total = trainer.global_step, trainer.estimated_stepping_batches
        self._since = time.monotonic()

    def update(self, trainer: Any, batch: Any) -> bool:
        """Take note of a batch; True if it ended a logging step."""
        self._examples += batch.pairs.examples * trainer.world_size
        if trainer.global_step == self.step:  # in the middle of an accumulation
            return False
        self.step, now = trainer.global_step, time.monotonic()
        if self._begin is None:  # the first step also starts loaders and fills caches
            self._begin = self.step, now
        if self.step % trainer.log_every_n_steps and self.step != self.total:
            return False
        self.metrics = telling(trainer.callback_metrics)
        self.speed = self._examples / max(now - self._since, 1e-9)
        self._examples, self._since = 0, now
        return True

    @property
    def left(self) -> float | None:
        """Estimated seconds until the last step; None before ``SETTLED`` steps."""
        if self._begin is None or not math.isfinite(self.total):
            return None
        steps = self.step - self._begin[0]
        return None if steps < SETTLED else (time.monotonic() - self._begin[1]) / steps * (self.total - self.step)

    def figures(self) -> dict[str, str]:
        """What a bar shows, by name."""
        found = {name: f"{value:z.3f}" for name, value in self.metrics.items()}
        if self.speed is not None:
            found["examples/s"] = f"{self.speed:.1f}"
        if self.left:
            found["left"] = f"about {spoken(self.left)}"
        return found

    def sentence(self) -> str:
        """``loss 0.412, margins 0.215, accuracies 0.844, 27.8 examples/s, about 44 s left``, as far as it is known."""
        parts = [f"{name} {value:z.3f}" for name, value in self.metrics.items()]
        if self.speed is not None:
            parts.append(f"{self.speed:.1f} examples/s")
        if self.left:
            parts.append(f"about {spoken(self.left)} left")
        return ", ".join(parts)


def telling(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Of a trainer's metrics the loss, margins and accuracies, by the last part of their names.

    Where there is a mean over several responses, it stands for those of each.
    """
    names = [name for name in metrics if name.rpartition("/")[2] == "loss" and not name.startswith("val/")][:1]
    for kind in ("margin", "accurac"):
        alike = [name for name in metrics if name.rpartition("/")[2].startswith(kind)]
        alike = [name for name in alike if not name.startswith(("val/", "weighted_"))]
        names += [name for name in alike if not any(name != one and name.startswith(f"{one}_") for one in alike)]
    return {name.rpartition("/")[2]: float(metrics[name]) for name in names}


class Bar(RichProgressBar):
    """Lightning's bar for a terminal, with the figures of :class:`Pace`."""

    def __init__(self, stage: int) -> None:
        super().__init__(refresh_rate=10)
        self.stage, self.pace = stage, Pace()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.pace.start(trainer)
        super().on_train_start(trainer, pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.pace.update(trainer, batch)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Any:
        return self.pace.figures()

    def configure_columns(self, trainer: L.Trainer) -> list:
        style: Any = dict.fromkeys(("complete_style", "finished_style", "pulse_style"), "cyan")
        return [Where(self), CustomBarColumn(bar_width=12, **style), BatchesProcessedColumn(style="")]


class Where(ProgressColumn):
    """Stage and epoch, counted from 1; of bars that do not train, what Lightning calls them."""

    def __init__(self, bar: Bar) -> None:
        super().__init__()
        self.bar = bar

    def render(self, task: Task) -> Text:
        if task.id != self.bar.train_progress_bar_id:
            return Text(task.description)
        trainer = self.bar.trainer
        epoch, last = trainer.current_epoch + 1, trainer.max_epochs
        of = f"{min(epoch, last)} of {last}" if last and last > 0 else str(epoch)  # after the last one it is one more
        return Text(f"stage {self.bar.stage}, epoch {of}")


class ProgressLines(ProgressBar):
    """Lines, where nothing can be redrawn: one after the first steps, then every ``EVERY`` seconds, and the last."""

    def __init__(self, stage: int) -> None:
        super().__init__()
        self.stage, self.pace = stage, Pace()
        self.on, self.said = True, 0.0

    def disable(self) -> None:
        self.on = False

    def enable(self) -> None:
        self.on = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.pace.start(trainer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        pace, now = self.pace, time.monotonic()
        if not pace.update(trainer, batch) or not self.on:
            return
        due = pace.left is not None and (not self.said or now - self.said >= EVERY)
        if due or pace.step == pace.total:
            self.said = now
            of = f" of {pace.total}" if math.isfinite(pace.total) else ""
            log.info("stage %d: step %d%s, %s", self.stage, pace.step, of, pace.sentence())


def progress(stage: int) -> ProgressBar:
    """The progress of a stage that was not given a progress bar of its own."""
    return Bar(stage) if redraws() else ProgressLines(stage)


# --- panels -----------------------------------------------------------------------------------------------------------


def finished(run: Path, seconds: float | None = None) -> None:
    """Show a finished run: the row of the table and where everything lies, read from its folder."""
    if first():
        title, rows = summary(run)
        show(log, title + (f", finished in {spoken(seconds)}" if seconds is not None else ""), rows)


def summary(run: Path) -> tuple[str, list[tuple[str, str]]]:
    """The closing panel's title and rows, from results.json and the files beside it."""
    found = read(run / "results.json")
    row = row_of(found)
    rows = [("scores", in_columns([(column.heading, cell.text(column.decimals)) for column, cell in row]))]
    if any(cell.own_words for _, cell in row):
        rows.append((OWN_WORDS, OWN_WORDS_MEANS))
    if found.limit:
        asked = ", ".join(f"{name} {one['asked']} of {one['of']} questions" for name, one in found.limits.items())
        rows.append(("quick look", f"{found.limit}: {asked}; compare with nothing else"))
    for name, scores in found.benchmarks.items():
        if isinstance(scores, Mapping) and "missing" in scores:
            rows.append(
                (name, f"not scored: {scores['missing']}" + (f"\n{scores['cure']}" if scores.get("cure") else ""))
            )
    rows.append(("folder", near(run)))
    adapters = sorted(run.glob("stage_*/adapter"))
    parts = {"results": "results.json", "captions": "captions.html", "answers": "benchmarks"}
    if adapters:
        parts["adapter"] = str(adapters[-1].relative_to(run))
    rows += [(name, part) for name, part in parts.items() if (run / part).exists()]
    if line := sync_line(Path(near(run))):
        rows.append(("W&B", f"offline; to upload:\n{line}"))
    return f"{found.row}, seed {found.seed}", [row for row in rows if row[1]]


def near(place: Path) -> str:
    """A path as it is named from the working directory, where that is shorter."""
    return min(str(place), os.path.relpath(place), key=len)


def in_columns(cells: list[tuple[str, str]]) -> str:
    """Headings with their values below, in as many pairs of lines as the width asks for."""
    room = width() - 20
    blocks: list[tuple[list[str], list[str]]] = []
    for heading, value in cells:
        size = max(len(heading), len(value))
        if not blocks or sum(len(cell) + 2 for cell in blocks[-1][0]) + size > room:
            blocks.append(([], []))
        blocks[-1][0].append(heading.rjust(size))
        blocks[-1][1].append(value.rjust(size))
    return "\n".join("  ".join(line) for block in blocks for line in block)
