"""A run as its loggers see it."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig

from povid import files
from povid.run.settings import Settings


@dataclass(frozen=True)
class RunContext:
    """A run and the job of it that logs.

    Attributes:
        folder: the run's.
        job: stage_1, stage_2 or eval.
        group: the name of its sweep.
        tags: its row, ablation, objective, noise, model and data.
        config: the whole configuration.
        start: the first optimiser step that this job takes; more than 0 if it is resumed.
        offset: optimiser steps of the stages before this job.
    """

    folder: Path
    job: str
    group: str
    tags: tuple[str, ...]
    config: Mapping[str, Any]
    start: int = 0
    offset: int = 0

    @classmethod
    def of(cls, settings: Settings, folder: Path, job: str, start: int = 0) -> RunContext:
        sweep = folder.parent.name if (folder.parent / "multirun.yaml").exists() else folder.name
        chosen = HydraConfig.get().runtime.choices.get("noise") if HydraConfig.initialized() else None
        noise = chosen or settings.tree["noise"]["_target_"].rpartition(".")[2].lower()
        tags = (
            settings.plain.row,
            settings.ablation.name,
            settings.objective,
            noise,
            settings.model.name,
            settings.data.name,
        )
        offset = sum(steps for name, steps in _finished(folder) if name != job)
        return cls(folder, job, sweep, tuple(dict.fromkeys(tags)), settings.tree, start, offset)

    def earlier_rows(self) -> Iterator[tuple[str, dict[str, float], int]]:
        """What was logged before this job or this attempt at it: (job, values with its step, step over all stages)."""
        before = 0
        jobs = [(name, steps, steps) for name, steps in _finished(self.folder) if name != self.job]
        for name, steps, until in [*jobs, (self.job, 0, self.start)]:
            for row in _rows(self.folder / name / "metrics.csv"):
                step = int(row["step"])
                if step < until:
                    yield name, row | {"step": step}, before + step
            before += steps


def _finished(folder: Path) -> Iterator[tuple[str, int]]:
    """The finished stages in a run's folder, in order, and how many optimiser steps each took.

    Raises:
        Fault: a stage.json is damaged.
    """
    for note in sorted(folder.glob("stage_*/stage.json")):
        cure = f"restore it from a copy, or move {note.parent} away to train the stage again"
        yield note.parent.name, files.read_json(note, dict, cure, ("steps",))["steps"]


def _rows(file: Path) -> Iterator[dict[str, float]]:
    """The rows of a metrics.csv, without what is no number."""
    if file.exists():
        with file.open(newline="", encoding="utf-8", errors="replace") as lines:
            for line in csv.DictReader(lines):
                try:
                    yield {name: float(text) for name, text in line.items() if text}
                except (TypeError, ValueError):  # a damaged line
                    continue
