"""A run: the stages of an ablation, one after the other, then the benchmarks, then results.json."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

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
from povid.run.lock import held
from povid.run.processes import first, leave_group, one_job, wait_for
from povid.run.resume import compare
from povid.run.settings import Settings, build
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
    settings = build(cfg)
    with explain_full_disk(folder), one_job(folder), held(folder) if first() else nullcontext():
        if first():
            claim(folder, settings)
            if (folder / "results.json").exists():
                log.info("finished already: %s", folder)
                return json.loads((folder / "results.json").read_text(encoding="utf-8"))
        return Experiment(settings, folder).run()


class Experiment:
    """A run in its folder."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings, self.folder = settings, folder
        self.timings: dict[str, float] = {}
        self.started = datetime.now(UTC).isoformat(timespec="seconds")

    def run(self) -> dict[str, Any]:
        keep_freed_memory()
        with self.timed("prepare"):
            triples = self.prepare()
        adapters = starting_adapters(self.settings)
        stages: dict[str, Any] = {}
        for number in self.settings.run_stages:
            stage = Stage(self.settings, number, self.folder, adapters)
            if stage.note.exists():
                log.info("stage %d is finished already: %s", number, stage.home)
            else:
                self.train(stage, triples)
            stages[str(number)] = json.loads(stage.note.read_text(encoding="utf-8"))
            adapters = (*adapters, stage.adapter)
        if not first():
            return {}
        leave_group()
        with self.timed("evaluate"):
            results = evaluation.evaluate(self.settings, self.folder, triples, adapters, stages, self.started)
        results["timings"] = {name: round(seconds, 2) for name, seconds in self.timings.items()}
        files.write_json(self.folder / "results.json", results)
        log.info("results: %s", self.folder / "results.json")
        return results

    def prepare(self) -> list[Triple]:
        """Make data and model ready, check data and benchmarks, and record what is run; returns the triples."""
        settings, record = self.settings, self.folder / "config.yaml"
        if first():
            for node in (settings.data.prepare, getattr(settings.model, "prepare", None)):
                if node:
                    make(node)
            evaluation.warn_of_missing(settings)
        else:
            wait_for(record)
        triples = load_triples(settings) if settings.run_stages or settings.plain.samples else []
        if first():
            if settings.run_stages and not settings.data.skip_bad:
                refuse(check(settings, triples, CHECKED_AT_START), settings.data.preferences)
            files.write_text(self.folder / "packages.txt", packages())
            files.write_text(record, OmegaConf.to_yaml(OmegaConf.create(settings.tree)))
        return triples

    def train(self, stage: Stage, triples: list[Triple]) -> None:
        with self.timed(f"stage_{stage.number}.load"):
            policy, template = stage.load()
            if stage.number == self.settings.run_stages[0] and first() and not self.settings.split:
                samples = evaluation.sample_questions(triples, self.settings.plain.samples)
                answers = Answers(policy, template, self.settings.generation.batch_size)
                evaluation.write_captions_before(self.folder, answers, samples)
        with self.timed(f"stage_{stage.number}.fit"):
            stage.train(policy, template, triples)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.timings[name] = time.perf_counter() - start


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
    except OSError as error:
        raise Fault(
            f"{folder} cannot be written ({error.strerror}); free space or choose another hydra.run.dir"
        ) from None
