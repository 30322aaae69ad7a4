"""A run: the stages of an ablation, one after the other, then the benchmarks, then results.json."""

from __future__ import annotations

import gc
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from povid import files
from povid.fault import Fault
from povid.machine import keep_freed_memory, packages
from povid.model.generation import Answers
from povid.preferences.triple import Triple
from povid.run import evaluation
from povid.run.build import make
from povid.run.data import check, load_triples
from povid.run.guards import explain_full_disk, refuse
from povid.run.lock import NAME, held
from povid.run.processes import first, leave_group, one_job, wait_for
from povid.run.resume import compare, in_sweep
from povid.run.settings import Settings, build
from povid.run.signals import Signals, requeue_signal
from povid.run.stage import Stage, starting_adapters

log = logging.getLogger(__name__)

for _chatty in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch"):
    logging.getLogger(_chatty).setLevel(logging.WARNING)

CHECKED_AT_START = 32  # records; the others are checked while the first epoch trains


def run(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """Train the stages that a configuration asks for, answer its benchmarks, write ``folder/results.json``.

    With ``resume`` a run in ``folder`` is resumed: what is finished there stays, and an interrupted stage continues
    from its newest checkpoint. Returns what results.json holds; in the further processes of a run on several devices,
    which only train, nothing.

    Raises:
        Fault: everything that a user can mend; a finished stage stays in its folder whatever happens after it.
        Stopped: the run was told to stop and has saved what it was doing.
    """
    with explain_full_disk(folder), one_job(folder), held(folder) if first() else nullcontext():
        new = not (folder / "config.yaml").exists()
        with checking(folder, new), refusal(folder):
            settings = build(cfg)
        return _run(settings, folder, new)


def _run(settings: Settings, folder: Path, new: bool) -> dict[str, Any]:
    signals = Signals(folder, requeue_signal(settings.trainer))
    with signals.handled():
        if first():
            claim(folder, settings)
            if (folder / "results.json").exists():
                log.info("finished already: %s", folder)
                return files.read_json(
                    folder / "results.json", dict, "move it away and resume the run to write it again from what is kept"
                )
        return Experiment(settings, folder, signals).run(new)


class Experiment:
    """A run in its folder."""

    def __init__(self, settings: Settings, folder: Path, signals: Signals) -> None:
        self.settings, self.folder, self.signals = settings, folder, signals
        self.timings: dict[str, float] = {}
        self.started = datetime.now(UTC).isoformat(timespec="seconds")

    def run(self, new: bool) -> dict[str, Any]:
        """``new``: the run begins here, and leaves nothing behind if the checks refuse it."""
        keep_freed_memory()
        with self.timed("prepare"), checking(self.folder, new):
            triples = self.prepare()
            adapters = starting_adapters(self.settings)
        stages: dict[str, Any] = {}
        for number in self.settings.run_stages:
            stage = Stage(self.settings, number, self.folder, adapters)
            if stage.note.exists():
                log.info("stage %d is finished already: %s", number, stage.home)
            else:
                self.train(stage, triples)
                release_memory()
            stages[str(number)] = stage.notes()
            adapters = (*adapters, stage.adapter)
        if not first():
            return {}
        leave_group()
        with self.timed("evaluate"):
            results, captions = evaluation.evaluate(self.settings, self.folder, triples, adapters, stages, self.started)
        results["timings"] = {name: round(seconds, 2) for name, seconds in self.timings.items()}
        files.write_json(self.folder / "results.json", results)
        log.info("results: %s", self.folder / "results.json")
        evaluation.show(self.settings, self.folder, results, triples, captions)
        return results

    def prepare(self) -> list[Triple]:
        """Make data and model ready and check data and benchmarks; returns the triples."""
        settings, ready = self.settings, self.folder / "packages.txt"
        if first():
            for node in (settings.data.prepare, getattr(settings.model, "prepare", None)):
                if node:
                    make(node)
            evaluation.warn_of_missing(settings)
        else:
            wait_for(ready)
        triples = load_triples(settings) if settings.run_stages or settings.plain.samples else []
        if first():
            if settings.run_stages and not settings.data.skip_bad:
                refuse(check(settings, triples, CHECKED_AT_START), settings.data.preferences)
            files.write_text(ready, packages())
        return triples

    def train(self, stage: Stage, triples: list[Triple]) -> None:
        with self.timed(f"stage_{stage.number}.load"):
            policy, template = stage.load()
            if stage.number == self.settings.run_stages[0] and first() and not self.settings.split:
                samples = evaluation.sample_questions(triples, self.settings.plain.samples)
                answers = Answers(policy, template, self.settings.generation.batch_size)
                evaluation.write_captions_before(self.folder, answers, samples)
        with self.timed(f"stage_{stage.number}.fit"):
            try:
                stage.train(policy, template, triples, self.signals)
            finally:
                self.signals.training, self.signals.launcher = False, None
        self.signals.check()  # a signal after the last step waited for the stage to be saved

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.timings[name] = time.perf_counter() - start


def release_memory() -> None:
    """Give a finished stage's weights, gradients and optimiser state back before the next stage loads its own.

    Trainer and module refer to each other, so that they would otherwise stay until Python happens to collect them.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def checking(folder: Path, new: bool) -> Iterator[None]:
    """Leave no run folder behind where the checks inside refuse a new run, which has then done nothing.

    A job of a sweep keeps its folder: it is refused again, or run, when the sweep is resumed.
    """
    try:
        yield
    except Fault:
        if new and first() and not in_sweep(folder):
            nothing = {".hydra", NAME, "config.yaml", "packages.txt"}
            if all(entry.name in nothing or entry.suffix == ".log" for entry in folder.iterdir()):
                files.remove(folder)
        raise


@contextmanager
def refusal(folder: Path) -> Iterator[None]:
    """Keep the problems of a sweep's job that cannot run in error.txt, so that resume=latest does not wait for it."""
    note = folder / "error.txt"
    if first():
        note.unlink(missing_ok=True)
    try:
        yield
    except Fault as fault:
        if first() and in_sweep(folder):
            files.write_text(note, f"{fault}\n")
        raise


def claim(folder: Path, settings: Settings) -> None:
    """Make the folder this run's own, or the run in it this one; a requeued cluster job always resumes.

    Raises:
        Fault: another run lies there, this one without ``resume``, or the folder cannot be written.
    """
    run_files = ("results.json", "config.yaml", "stage_1", "stage_2", "benchmarks")
    taken = [name for name in run_files if (folder / name).exists()]
    requeued = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
    if taken and not (settings.plain.resume or requeued):
        raise Fault(
            f"{folder} holds a run already ({', '.join(taken)}); choose another hydra.run.dir, or resume it with "
            "resume=true"
        )
    if (folder / "config.yaml").exists():
        compare(folder / "config.yaml", settings.tree)
    try:
        files.write_text(folder / ".writable", "1").unlink()
        if not (folder / "results.json").exists():
            files.write_text(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(settings.tree)))
    except OSError as error:
        raise Fault(
            f"{folder} cannot be written ({error.strerror}); free space or choose another hydra.run.dir"
        ) from None
