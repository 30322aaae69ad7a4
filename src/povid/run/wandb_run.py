"""Weights & Biases: one run of theirs for one run folder, online or offline, which never stops the run.

All jobs of a run (its stages and its evaluation) log to the same W&B run: names begin with the job (``stage_1/loss``,
``eval/chair/CHAIR_S``), and W&B's own step counts the optimiser steps of all stages. What is logged under ``val/`` and
``probe/`` keeps its name and continues from one stage to the next.
"""

from __future__ import annotations

import logging
import os
import secrets
import shlex
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only
from pydantic import AfterValidator

from povid import files
from povid.benchmarks.benchmark import Column
from povid.internals import wandb_records
from povid.report import tables
from povid.run.context import RunContext

log = logging.getLogger(__name__)

SECTIONS = ("val/", "probe/", "eval/")  # names that are the same in all jobs
BEST = {  # the summary holds the best value beside the last
    "loss": "min",
    "rewards/accuracies": "max",
    "rewards/margins": "max",
}
PLACES = ("WANDB_DATA_DIR", "WANDB_CACHE_DIR")  # else in the user's home; artifacts and pictures wait there
UPLOAD_SECONDS = 120  # that the end of a run waits for uploads; the rest stays on disk


def wandb_mode(mode: str) -> str:
    """Resolve ``auto``: online if logged in (with a key in the environment or in netrc), else offline."""
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    if mode != "auto":
        return mode
    import wandb

    return "online" if wandb.api.api_key else "offline"


def _logged_in(mode: str) -> str:
    """``online`` is for who has logged in: a run would stop at its first stage to ask for a key."""
    if wandb_mode(mode) == "online":
        import wandb

        if not wandb.api.api_key:
            raise ValueError("online needs a login: run `wandb login`, set WANDB_API_KEY, or use auto")
    return mode


Mode = Annotated[Literal["auto", "online", "offline", "disabled"], AfterValidator(_logged_in)]


def wandb_logger(
    run: RunContext, project: str = "povid", entity: str | None = None, mode: Mode = "auto", artifacts: bool = True
) -> WandbRun:
    """The W&B run of a run folder, in the group of its sweep.

    Its id is stored in ``folder/wandb_id``, so that a resumed run continues the same W&B run, also offline.

    Args:
        run: the run and its job.
        project, entity: W&B's project, and the user or team that owns it.
        mode: online, offline, disabled, or auto: online if logged in, else offline.
        artifacts: whether the run's adapters and answers become artifacts.
    """
    return WandbRun(run, project, entity, wandb_mode(mode), artifacts)


class WandbRun(WandbLogger):
    """What Lightning sees of the W&B run; ``experiment`` is the W&B run itself."""

    def __init__(self, run: RunContext, project: str, entity: str | None, mode: str, artifacts: bool) -> None:
        place = run.folder / "wandb_id"
        if not place.exists():
            sweep = os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None  # set by wandb agent
            files.write_text(place, sweep or secrets.token_hex(4))
        super().__init__(
            project=project,
            entity=entity,
            name=run.folder.name,
            id=place.read_text(encoding="utf-8"),
            save_dir=str(run.folder),
            group=run.group,
            tags=list(run.tags),
            config=dict(run.config),
            mode=mode,
        )
        self.context, self.artifacts = run, artifacts
        self.failed = False

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            self._experiment = self._continued() or self._opened()
            self._define()
        return self._experiment

    def _continued(self) -> Any:
        """The W&B run that an earlier job of this process has opened."""
        return next((run for run in _opened if run.id == self._id), None)

    def _opened(self) -> Any:
        import wandb

        for name in PLACES:
            if os.environ.get(name) in (None, _places.get(name)):
                _places[name] = os.environ[name] = str(self.context.folder / "wandb" / name.split("_")[1].lower())
        if wandb.run is None:
            with suppress(Exception):  # what a forked process raises, whose parent's session it is
                wandb.teardown()  # of a session that began with other places, as asking for the login begins one
        run = self._init()
        _opened.append(run)
        if self._wandb_init.get("mode") == "online":
            log.info("W&B: %s", run.url)
        resumed = run.step - 1 if getattr(run, "resumed", False) else _last_step(self.context.folder, run.id)
        _recorded[run.id] = resumed
        for section, row, step in self.context.earlier_rows():
            if step > resumed:  # W&B lost it in a kill, or another run computed the stage
                run.log({f"{section}/{name}": value for name, value in row.items()}, step=step)
        return run

    def _init(self) -> Any:
        """Open it as configured, else offline, else (W&B itself does not work here) as a run that drops everything."""
        import wandb

        limits = wandb.Settings(finish_timeout=UPLOAD_SECONDS)
        try:
            return wandb.init(**self._wandb_init, settings=limits)
        except Exception as error:  # no connection, a key that expired, a full quota, or whatever W&B raises
            self._go_offline(error)
        try:
            return wandb.init(**self._wandb_init, settings=limits)
        except Exception as error:
            log.warning("nothing is logged to W&B (%s: %s)", type(error).__name__, error)
            return wandb.init(mode="disabled")

    def _go_offline(self, error: BaseException) -> None:
        import wandb

        log.warning(
            "W&B cannot be reached (%s); this run is logged offline below %s/wandb: upload it later with wandb sync",
            (str(error).splitlines() or [type(error).__name__])[0],
            self.context.folder,
        )
        finish("failed")
        wandb.teardown()  # of the connection that failed
        os.environ.pop("WANDB_SERVICE", None)  # a service that another process started still holds this run's id
        os.environ["WANDB_MODE"] = "offline"  # for the other runs of this process, which would wait as long again
        self._wandb_init["mode"] = "offline"
        time.sleep(1)  # W&B names a run's folder by the second, and the one that failed may be as old

    def _define(self) -> None:
        """A stage's metrics over its own steps, and the best values in the summary."""
        run, job = self._experiment, self.context.job
        if f"{job}/" in SECTIONS:
            return
        run.define_metric(f"{job}/step", hidden=True)
        run.define_metric(f"{job}/*", step_metric=f"{job}/step")
        for name, best in BEST.items():
            run.define_metric(f"{job}/{name}", step_metric=f"{job}/step", summary=f"last,{best}")
            run.define_metric(f"val/{name}", summary=f"last,{best}")

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log what a step of this job yields; steps that W&B has already, from before a kill, are left out."""
        named = {self._named(name): value for name, value in metrics.items()}
        if step is None:
            self._try(lambda run: run.log(named))
            return
        named[f"{self.context.job}/step"] = step
        place = self.context.offset + step
        self._try(lambda run: run.log(named, step=place) if place > _recorded.get(run.id, -1) else None)

    def _named(self, name: str) -> str:
        return name if name.startswith(SECTIONS) else f"{self.context.job}/{name.removeprefix('train/')}"

    def _try(self, action: Any) -> None:
        """Do something with the W&B run; if it fails, go on offline, with one warning."""
        if self.failed:
            return
        try:
            action(self.experiment)
        except Exception as error:  # the W&B service ended, or a disk is full
            self.failed = True
            self._go_offline(error)
            self._experiment = None
            try:
                action(self.experiment)
                self.failed = False
            except Exception as again:
                log.warning("nothing more is logged to W&B (%s: %s)", type(again).__name__, again)

    # --- evaluation -------------------------------------------------------------------------------------------------

    @rank_zero_only
    def log_results(self, results: Mapping[str, Any], figures: Mapping[str, float]) -> None:
        """All figures under their names, and those of Table 3 under the table's headings, as summary columns."""
        summary = {**figures, **table_3(results)}
        self._try(lambda run: run.summary.update(summary))

    @rank_zero_only
    def log_tables(self, step: int = 0, **tables: Callable[[], Any]) -> None:
        """Log W&B tables by name; each is made when it is needed."""
        place, job = self.context.offset + step, self.context.job
        self._try(lambda run: run.log({f"{job}/{name}": made() for name, made in tables.items()}, step=place))

    @rank_zero_only
    def log_files(self, results: Mapping[str, Any]) -> None:
        """The adapters and the answers as artifacts."""
        if self.artifacts:
            self._try(lambda run: _log_files(run, self.context.folder, results))


_opened: list[Any] = []  # by this process, and not finished
_recorded: dict[str, int] = {}  # the last step that W&B had of a run when this process opened it
_places: dict[str, str] = {}  # environment variables that were set here


def finish(status: str = "success") -> None:
    """Finish the W&B run, since the next run of a sweep would otherwise continue it."""
    while _opened:
        run = _opened.pop()
        try:
            run.finish(exit_code=0 if status == "success" else 1)
        except Exception as error:
            log.warning("W&B did not finish (%s: %s)", type(error).__name__, error)


def sync_line(folder: Path) -> str | None:
    """The shell command that uploads what a run logged offline, in all attempts; None if it logged nothing offline."""
    if not any((folder / "wandb").glob("offline-run-*")):
        return None
    return f"wandb sync {shlex.quote(str(folder / 'wandb'))}/offline-run-*"


def table_3(results: Mapping[str, Any]) -> dict[str, Any]:
    """A run's cells of Table 3 by the headings there, without arrows."""
    columns = {column["key"]: Column(**column).name for column in results["columns"]}
    columns |= {key: column.name for key, column in tables.COLUMNS.items()}
    text, noise = tables.MARKS.get(results["row"], ("", ""))
    cells: dict[str, Any] = {"row": results["row"], "Text disprefer": text, "Image distortion": noise}
    for key, heading in columns.items():
        benchmark, _, score = key.partition(".")
        value = results["benchmarks"].get(benchmark, {}).get(score)
        if isinstance(value, (int, float)):
            cells[heading] = value
    return cells


def _last_step(folder: Path, name: str) -> int:
    """The last step that the files of a W&B run hold; -1 if there is none."""
    last = -1
    for file in (folder / "wandb").glob(f"*-{name}*/run-{name}.wandb"):
        for record in wandb_records(file):
            if record.WhichOneof("record_type") == "history":
                last = max(last, record.history.step.num)
    return last


def _log_files(run: Any, folder: Path, results: Mapping[str, Any]) -> None:
    import wandb

    about = {key: results[key] for key in ("row", "seed", "objective", "model", "data")}
    adapters = sorted(folder.glob("stage_*/adapter"))
    if adapters:
        made = wandb.Artifact(f"adapter-{run.id}", type="model", metadata=about)
        for adapter in adapters:
            made.add_dir(str(adapter), name=adapter.parent.name, policy="immutable")
        run.log_artifact(made)
    answers = [*folder.glob("benchmarks/*/answers.jsonl"), *folder.glob("benchmarks/*/scores.json")]
    if answers:
        made = wandb.Artifact(f"answers-{run.id}", type="answers", metadata=about)
        for file in (*answers, folder / "results.json"):
            made.add_file(str(file), name=str(file.relative_to(folder)), policy="immutable")
        run.log_artifact(made)
