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
from povid.model.policy import Policy
from povid.model.template import Template
from povid.preferences.triple import Triple
from povid.run import evaluation
from povid.run.build import make
from povid.run.content import Content, of_answers, of_stage
from povid.run.context import RunContext
from povid.run.data import check, load_triples
from povid.run.guards import explain_full_disk, refuse
from povid.run.lock import NAME, held
from povid.run.loggers import require_loggers
from povid.run.processes import first, leave_group, one_job, wait_for
from povid.run.resume import compare, in_sweep
from povid.run.samples import ask_before
from povid.run.settings import Settings, build, check_devices
from povid.run.signals import Signals, requeue_signal
from povid.run.stage import Stage, starting_adapters
from povid.run.wandb_run import finish, sync_line

log = logging.getLogger(__name__)

for _chatty in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch"):
    logging.getLogger(_chatty).setLevel(logging.WARNING)

CHECKED_AT_START = 32  # records; the others are checked while the first epoch trains


def run(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """Train the stages that a configuration asks for, answer its benchmarks, write ``folder/results.json``.

    With ``resume`` a run in ``folder`` is resumed: finished stages are kept, and an interrupted stage continues from
    its newest checkpoint. Returns the content of results.json; nothing in the further processes of a run on several
    devices, which only train.

    Raises:
        Fault: any error that a user can fix; finished stages stay in the folder.
        Stopped: the run received a signal to stop and has saved a checkpoint.
    """
    with explain_full_disk(folder), one_job(folder), held(folder) if first() else nullcontext():
        new = not (folder / "config.yaml").exists()
        with checking(folder, new), refusal(folder):
            settings = build(cfg)
            check_devices(settings)
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
        try:
            results = Experiment(settings, folder, signals).run(new)
        except BaseException:
            finish("failed")
            raise
        finish()
        if first() and (line := sync_line(folder)):
            log.info("upload the W&B run with: %s", line)
        return results


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
            triples, content, adapters = self.prepare()
        stages: dict[str, Any] = {}
        for number in self.settings.run_stages:
            stage = self.stage(number, adapters, content)
            if stage.finished():
                log.info("stage %d is finished already: %s", number, stage.home)
            else:
                self.train(stage, triples)
                release_memory()
            stages[str(number)] = stage.finished()
            adapters = (*adapters, stage.adapter)
        if not first():
            return {}
        leave_group()
        with self.timed("evaluate"):
            results, captions = evaluation.evaluate(
                self.settings,
                self.folder,
                triples,
                adapters,
                stages,
                self.started,
                of_answers(self.settings, adapters, content),
            )
        results["timings"] = {name: round(seconds, 2) for name, seconds in self.timings.items()}
        files.write_json(self.folder / "results.json", results)
        log.info("results: %s", self.folder / "results.json")
        evaluation.show(self.settings, self.folder, results, triples, captions)
        return results

    def stage(self, number: int, adapters: tuple[Path, ...], content: Content) -> Stage:
        identity = of_stage(self.settings, number, adapters, content)
        return Stage(self.settings, number, self.folder, adapters, identity)

    def prepare(self) -> tuple[list[Triple], Content, tuple[Path, ...]]:
        """Prepare data and model, check data and benchmarks, reuse what was computed.

        Returns the triples, the digests of what is read, and the adapters to begin with.
        """
        settings, ready = self.settings, self.folder / "packages.txt"
        if first():
            for node in (settings.data.prepare, getattr(settings.model, "prepare", None)):
                if node:
                    make(node)
            require_loggers(settings.loggers, RunContext.of(settings, self.folder, "check"))
            evaluation.warn_of_missing(settings)
        else:
            wait_for(ready)
        triples = load_triples(settings) if settings.run_stages or settings.plain.samples else []
        if first() and settings.run_stages and not settings.data.skip_bad:
            refuse(check(settings, triples, CHECKED_AT_START), settings.data.preferences)
        content = Content(settings, triples)
        adapters = starting_adapters(settings, content)
        if first():
            if not ready.exists():  # the other processes wait for it, and all must see the same stages finished
                self.take_over(adapters, content, triples)
            files.write_text(ready, packages())
        return triples, content, adapters

    def take_over(self, adapters: tuple[Path, ...], content: Content, triples: list[Triple]) -> None:
        """Use again what has been computed under the identity of the first stages, up to the first that has not."""
        for number in self.settings.run_stages:
            stage = self.stage(number, adapters, content)
            if not stage.note.exists():
                if not stage.reuse():
                    return
                if number == self.settings.run_stages[0] and self.settings.plain.samples:
                    self.caption_before(*stage.load(), triples)
            adapters = (*adapters, stage.adapter)

    def train(self, stage: Stage, triples: list[Triple]) -> None:
        with self.timed(f"stage_{stage.number}.load"):
            policy, template = stage.load()
            if stage.number == self.settings.run_stages[0] and first():
                self.caption_before(policy, template, triples)
        with self.timed(f"stage_{stage.number}.fit"):
            try:
                stage.train(policy, template, triples, self.signals)
            finally:
                self.signals.training, self.signals.launcher = False, None
        self.signals.check()  # a signal after the last step waited for the stage to be saved

    def caption_before(self, policy: Policy, template: Template, triples: list[Triple]) -> None:
        """What the policy says before the first stage, for the tables of samples; not where its weights are split."""
        if not self.settings.split:
            samples = evaluation.sample_questions(triples, self.settings.plain.samples)
            answers = Answers(policy, template, self.settings.generation.batch_size)
            evaluation.write_captions_before(self.folder, answers, samples)
            if samples:
                ask_before(self.settings, self.folder, answers)

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
    """Take the folder for this run, or resume the run in it; a requeued cluster job always resumes.

    Raises:
        Fault: the folder contains a run with other settings, or one and ``resume`` is not set, or cannot be written.
    """
    run_files = ("results.json", "config.yaml", "stage_1", "stage_2", "benchmarks")
    taken = [name for name in run_files if (folder / name).exists()]
    requeued = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
    if taken and not (settings.plain.resume or requeued):
        raise Fault(
            f"{folder} holds a run already ({', '.join(taken)}); choose another hydra.run.dir, or resume it with "
            "resume=true"
        )
    if taken and not (folder / "config.yaml").exists():
        raise Fault(
            f"{folder / 'config.yaml'} is missing, so the settings that this run was started with are unknown; put it "
            "back, or start in another folder"
        )
    if taken:
        bound = ("generation.batch_size",) if evaluation.batch_that_counts(settings) else ()
        compare(folder / "config.yaml", settings.tree, bound)
    try:
        files.write_text(folder / ".writable", "1").unlink()
        if not (folder / "results.json").exists():
            files.write_text(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(settings.tree)))
    except OSError as error:
        raise Fault(
            f"{folder} cannot be written ({error.strerror}); free space or choose another hydra.run.dir"
        ) from None
