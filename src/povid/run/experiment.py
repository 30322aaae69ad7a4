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
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from povid import files
from povid.benchmarks.processes import Processes, ProcessFailed
from povid.fault import Fault
from povid.machine import keep_freed_memory, packages
from povid.model.generation import Answers
from povid.model.question import Answerer, Share
from povid.preferences.triple import Triple
from povid.run import evaluation
from povid.run.answering import answerer
from povid.run.build import make
from povid.run.content import Content, of_answers, of_stage
from povid.run.context import RunContext
from povid.run.data import check, check_all, held_out_source, load_triples, split
from povid.run.guards import explain_full_disk, refuse
from povid.run.identity import flat
from povid.run.lock import NAME, held
from povid.run.loggers import require_loggers
from povid.run.processes import first, gathered, one_job, wait_for
from povid.run.resume import COMMAND, compare, in_sweep, job_count, write_command
from povid.run.samples import ask_before
from povid.run.settings import Settings, build, check_devices
from povid.run.signals import Signals, requeue_signal
from povid.run.stage import Stage, starting_adapters
from povid.run.terminal import finished, near
from povid.run.wandb_run import finish

log = logging.getLogger(__name__)

CHECKED_AT_START = 32  # records; the others are checked while the first epoch trains


def run(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """Train the stages that a configuration asks for, answer its benchmarks, write ``folder/results.json``.

    With ``resume`` a run in ``folder`` is resumed: finished stages are kept, and an interrupted stage continues from
    its newest checkpoint. Returns the content of results.json; nothing in the further processes of a run on several
    devices, which train and answer.

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
    signals, began = Signals(folder, requeue_signal(settings.trainer)), time.monotonic()
    with signals.handled():
        if first():
            claim(folder, settings)
            if (folder / "results.json").exists():
                log.info("finished already: %s", folder)
                cure = "move it away and resume the run to write it again from what is kept"
                results = files.read_json(
                    folder / "results.json", dict, cure, ("benchmarks", "row", "stages", "identity")
                )
                _same_questions(settings, folder)
                finished(folder)
                return results
        elif (folder / "results.json").exists():  # the first process has nothing left to share
            return {}
        try:
            results = Experiment(settings, folder, signals).run(new)
        except ProcessFailed:
            finish("failed")
            if not first():  # the process that failed has said why
                return {}
            raise
        except BaseException:
            finish("failed")
            raise
        finish()
        if first():
            finished(folder, time.monotonic() - began)
        return results


def _same_questions(settings: Settings, folder: Path) -> None:
    """Raise a Fault if a finished run was not asked what this command asks; where its files lie makes no difference."""
    then = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")).get("benchmarks") or {}
    now = settings.tree["benchmarks"]
    if new := [name for name in settings.benchmarks if name not in then]:
        raise Fault(
            f"{folder} is finished and has no answers to {', '.join(new)}; move its results.json away and resume it to "
            "add them"
        )
    for name in settings.benchmarks:
        there, wanted = dict(flat(then[name])), dict(flat(now[name]))
        for key in sorted({*there} & {*wanted} - {"data", "images"}):
            if there[key] != wanted[key]:
                raise Fault(
                    f"{folder} is finished, and benchmarks.{name}.{key} was {there[key]!r} there and is now "
                    f"{wanted[key]!r}; restore it, or start in another folder"
                )


class Experiment:
    """A run in its folder."""

    def __init__(self, settings: Settings, folder: Path, signals: Signals) -> None:
        self.settings, self.folder, self.signals = settings, folder, signals
        self.timings: dict[str, float] = {}
        self.taken_over = False  # the first stage was computed by another run, before which nobody was asked
        self.started = datetime.now(UTC).isoformat(timespec="seconds")

    def run(self, new: bool) -> dict[str, Any]:
        """``new``: the run begins here, and leaves nothing behind if the checks refuse it."""
        keep_freed_memory()
        if first():
            plain = self.settings.plain
            log.info("%s%s, seed %d, in %s", job_of(self.folder), plain.row, plain.seed, near(self.folder))
        with self.timed("prepare"), checking(self.folder, new):
            triples, held_out, content, adapters = self.prepare()
        with gathered(self.trainer(), self.folder, self.signals) as processes:
            return self.compute(processes, triples, held_out, content, adapters)

    def trainer(self) -> Any:
        """A trainer that makes the run's processes; None for a run of one."""
        if not self.settings.several:
            return None
        return make(self.settings.trainer, max_epochs=1, logger=False, enable_checkpointing=False)

    def compute(
        self,
        processes: Processes,
        triples: list[Triple],
        held_out: list[Triple],
        content: Content,
        adapters: tuple[Path, ...],
    ) -> dict[str, Any]:
        """Train the stages and answer, in all processes. Returns the content of results.json in the first one."""
        samples = held_out or triples
        stages: dict[str, Any] = {}
        if processes.exchange(self.taken_over)[0] and self.settings.plain.samples:
            with processes.together():
                answers = answerer(self.settings, adapters, processes)
            self.caption_before(answers, samples, processes)
        for number in self.settings.run_stages:
            stage = self.stage(number, adapters, content)
            if stage.finished():
                log.info("stage %d is finished already: %s", number, stage.home)
            else:
                self.train(stage, triples, held_out, processes)
                release_memory()
            stages[str(number)] = stage.finished()
            adapters = (*adapters, stage.adapter)
        if processes.of == 1 and not first():  # nothing is shared, as with a served model
            return {}
        with self.timed("evaluate"):
            results, captions = evaluation.evaluate(
                self.settings,
                self.folder,
                samples,
                adapters,
                stages,
                self.started,
                of_answers(self.settings, adapters, content),
                processes,
            )
        if processes.number:
            return {}
        results["timings"] = {name: round(seconds, 2) for name, seconds in self.timings.items()}
        files.write_json(self.folder / "results.json", results)
        evaluation.show(self.settings, self.folder, results, samples, captions)
        return results

    def stage(self, number: int, adapters: tuple[Path, ...], content: Content) -> Stage:
        identity = of_stage(self.settings, number, adapters, content)
        return Stage(self.settings, number, self.folder, adapters, identity, content.watched)

    def prepare(self) -> tuple[list[Triple], list[Triple], Content, tuple[Path, ...]]:
        """Prepare data and model, check data and benchmarks, reuse what was computed.

        Returns the triples to train on, those held out, the digests of what is read, and the adapters to begin with.
        """
        settings, ready = self.settings, self.folder / "packages.txt"
        if first():
            require_loggers(settings.loggers, RunContext.of(settings, self.folder, "check"))
            for node in (settings.data.prepare, getattr(settings.model, "prepare", None)):
                if node:
                    make(node)
            evaluation.warn_of_missing(settings)
        else:
            wait_for(ready)
        triples = load_triples(settings) if settings.run_stages or settings.plain.samples else []
        if first() and settings.run_stages and not settings.data.skip_bad:
            refuse(check(settings, triples, CHECKED_AT_START), settings.data.preferences)
        triples, held_out = split(settings, triples) if triples else ([], [])
        if first() and settings.run_stages:
            if held_out and not settings.data.skip_bad:
                refuse(check_all(settings, held_out), held_out_source(settings))
            for watcher in settings.watchers():
                watcher.before(settings.benchmarks)
        content = Content(settings, triples, held_out)
        adapters = starting_adapters(settings, content)
        if first():
            if not ready.exists():  # the other processes wait for it, and all must see the same stages finished
                self.take_over(adapters, content)
            files.write_text(ready, packages())
        return triples, held_out, content, adapters

    def take_over(self, adapters: tuple[Path, ...], content: Content) -> None:
        """Use again what has been computed under the identity of the first stages, up to the first that has not."""
        for number in self.settings.run_stages:
            stage = self.stage(number, adapters, content)
            if not stage.note.exists():
                if not stage.reuse():
                    return
                self.taken_over |= number == self.settings.run_stages[0]
            adapters = (*adapters, stage.adapter)

    def train(self, stage: Stage, triples: list[Triple], held_out: list[Triple], processes: Processes) -> None:
        settings, samples = self.settings, held_out or triples
        captioned = stage.number == settings.run_stages[0] and settings.plain.samples
        with self.timed(f"stage_{stage.number}.load"):
            if captioned and settings.split:  # with a policy of its own, since splitting one for training comes later
                with processes.together():
                    answers = answerer(settings, stage.adapters, processes)
                self.caption_before(answers, samples, processes)
                del answers
                release_memory()
            policy, template = stage.load()
            if captioned and not settings.split:
                share = Share(processes.number, processes.of)
                answers = Answers(policy, template, settings.generation.batch_size, share=share)
                self.caption_before(answers, samples, processes)
        with self.timed(f"stage_{stage.number}.fit"):
            try:
                with processes.training():
                    stage.train(policy, template, triples, held_out, self.signals)
            finally:
                self.signals.training = False
        self.signals.check()  # a signal after the last step waited for the stage to be saved

    def caption_before(self, answers: Answerer, samples: list[Triple], processes: Processes) -> None:
        """What the policy says before the first stage, for the tables of samples."""
        if asked := evaluation.sample_questions(samples, self.settings.plain.samples):
            evaluation.write_captions_before(self.folder, answers, asked, processes)
            ask_before(self.settings, self.folder, answers, processes)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.timings[name] = time.perf_counter() - start


def job_of(folder: Path) -> str:
    """``job 2 of 4: `` for a job of a sweep that Hydra runs; nothing for another run."""
    if not (HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN and in_sweep(folder)):
        return ""
    return f"job {int(HydraConfig.get().job.num) + 1} of {job_count(folder.parent / 'multirun.yaml')}: "


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
            nothing = {".hydra", NAME, COMMAND, "config.yaml", "packages.txt"}
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
        bound = ["benchmarks.limit", *(["generation.batch_size"] if evaluation.batch_that_counts(settings) else [])]
        unused = [] if settings.run_stages else ["trainer"]  # as many processes as one likes answer the same
        compare(folder / "config.yaml", settings.tree, bound, unused)
    try:
        files.write_text(folder / ".writable", "1").unlink()
        if not (folder / "results.json").exists():
            files.write_text(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(settings.tree)))
            write_command(folder)
    except OSError as error:
        raise Fault(
            f"{folder} cannot be written ({error.strerror}); free space or choose another hydra.run.dir"
        ) from None
