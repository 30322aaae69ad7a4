"""Callbacks that measure a stage while it trains and change nothing in it."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning as L

from povid import files
from povid.benchmarks.benchmark import Benchmark
from povid.fault import Fault

Better = Literal["low", "high"]
PREFIX = "val/"


class Watcher(L.Callback):
    """Measures a stage at some of its steps. What it measures can decide which adapter is kept (``checkpoint.best``).

    A stage is the same with or without it, so its settings are not part of the stage's identity: it must leave weights,
    optimizer, the order of the data and all random generators as it finds them. It is built when the settings are
    checked, and again for each stage.

    Class attributes:
        whole_weights: whether it needs all weights on one device, which a trainer that splits them does not have.

    Attributes:
        latest: the number of optimizer steps before its last measurement, and the metrics by name.
    """

    whole_weights: ClassVar[bool] = False
    latest: tuple[int, dict[str, float]] | None = None

    @property
    def metrics(self) -> Mapping[str, Better | None]:
        """The names of all metrics that it can log, and which direction is better; None for what is not a contest."""
        raise NotImplementedError

    def content(self) -> str:
        """A digest of the files that the metrics depend on. Raises Fault where one is missing."""
        return ""

    def before(self, benchmarks: Mapping[str, Benchmark]) -> None:
        """Look at what is measured before anything trains; ``benchmarks`` are those of the evaluation.

        Raises:
            Fault: a file is missing.
        """
        self.content()

    def measure(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Measure now, besides the steps of its own choice; afterwards ``latest`` is of this step."""
        raise NotImplementedError


class Validation(Watcher):
    """Writes what Lightning's validation loop logs under ``val/`` to validation.csv.

    Args:
        metrics: their names and directions (:func:`povid.training.metrics.directions`, under ``val/``).
        start: the step at which the stage begins or resumes.
    """

    def __init__(self, file: Path, metrics: Mapping[str, Better | None], start: int = 0) -> None:
        self.rows, self.known = Rows(file, start), metrics

    def state_dict(self) -> dict[str, Any]:
        return {"latest": self.latest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.latest = state["latest"] and (state["latest"][0], dict(state["latest"][1]))

    @property
    def metrics(self) -> Mapping[str, Better | None]:
        return self.known

    def on_validation_end(self, trainer: Any, module: L.LightningModule) -> None:
        values = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(PREFIX)}
        self.latest = trainer.global_step, values
        if trainer.is_global_zero:
            self.rows.add(trainer.global_step, trainer.current_epoch, values)


class Rows:
    """A CSV file of ``epoch, steps`` and metrics, one row for each measurement, forced to disk row by row.

    ``steps`` is the number of optimizer steps before the measurement. Rows after step ``start``, which an interrupted
    run wrote after its last checkpoint, are dropped because these steps are repeated.
    """

    def __init__(self, file: Path, start: int = 0) -> None:
        self.file, self.start, self.begun = file, start, False

    def add(self, steps: int, epoch: int, values: Mapping[str, float]) -> None:
        kept = self._rows() if self.begun or self.start else []
        if not self.begun:
            kept = [row for row in kept if int(row["steps"]) <= self.start]
        kept = [row for row in kept if int(row["steps"]) != steps]
        rows = [*kept, {"epoch": epoch, "steps": steps, **values}]
        columns = list(dict.fromkeys(name for row in rows for name in row))
        with files.draft(self.file) as draft, draft.open("w", newline="", encoding="utf-8") as sink:
            writer = csv.DictWriter(sink, columns)
            writer.writeheader()
            writer.writerows(rows)
        self.begun = True

    def _rows(self) -> list[dict[str, Any]]:
        if not self.file.exists():
            return []
        try:
            with self.file.open(newline="", encoding="utf-8") as source:
                rows = [numbers(row) for row in csv.DictReader(source)]
            for row in rows:
                int(row["steps"])
        except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
            raise Fault(
                f"{self.file} is damaged ({error}); restore it from a copy, or move it away to resume without its rows"
            ) from None
        return rows


def numbers(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a CSV file as it was read. Raises ValueError if it is cut, too long, or holds what is no number."""
    if None in row or None in row.values():
        raise ValueError(f"a row has {'more' if None in row else 'fewer'} values than there are columns")
    for text in row.values():
        float(text or 0)  # an empty value: a metric that was not measured at that step
    return row
