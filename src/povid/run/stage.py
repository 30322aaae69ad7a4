"""One stage of a run: load the policy, fit it, save what it learnt."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar
from safetensors import SafetensorError, safe_open

from povid import files
from povid.fault import Fault
from povid.method.objectives import ON_DISTORTED
from povid.model.adapters import adapter_chain
from povid.model.policy import Policy
from povid.model.template import Template
from povid.preferences.triple import Triple
from povid.run import data as run_data
from povid.run.build import make
from povid.run.checkpoint import Checkpoints, batch_size_of, loader_died, newest, step_of
from povid.run.guards import DataCheck, FiniteLoss
from povid.run.loggers import MetricsFile, RunContext, close, make_loggers
from povid.run.processes import device, end_children, first
from povid.run.settings import Settings
from povid.run.signals import Signals
from povid.training.datamodule import PreferenceDataModule
from povid.training.memory import estimate, largest_batch
from povid.training.module import POVIDModule
from povid.training.sharding import whole_adapter

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """Stage ``number`` of the run in ``run``: it starts from the policy that ``adapters`` make, which is its reference
    too."""

    settings: Settings
    number: int
    run: Path
    adapters: tuple[Path, ...]

    @property
    def home(self) -> Path:
        return self.run / f"stage_{self.number}"

    @property
    def note(self) -> Path:
        """Written last: a stage is finished when it is there."""
        return self.home / "stage.json"

    def notes(self) -> dict[str, Any]:
        """What a finished stage's note holds; Fault where the note or the adapter is damaged."""
        cure = f"restore it from a copy, or move {self.home} away to train the stage again"
        note = files.read_json(self.note, dict, cure, ("fingerprint", "steps", "adapter"))
        files.read_json(self.adapter / "adapter_config.json", dict, cure)
        weights = self.adapter / "adapter_model.safetensors"
        try:
            with safe_open(weights, "pt") as content:
                content.keys()
        except (OSError, SafetensorError) as error:
            raise Fault(f"{weights} is damaged ({str(error).splitlines()[0]}); {cure}") from None
        return note

    @property
    def adapter(self) -> Path:
        return self.home / "adapter"

    @property
    def checkpoints(self) -> Path:
        return self.home / "checkpoints"

    def load(self) -> tuple[Policy, Template]:
        """The policy with a fresh adapter, on this process's device or, where the trainer splits it, in memory."""
        L.seed_everything(self.settings.plain.seed, workers=True, verbose=False)
        policy = self.settings.model.policy(self.adapters, adapted=True)
        if not self.settings.split:
            policy = policy.to(device())
        return policy, self.settings.model.template(policy.processor)

    def train(self, policy: Policy, template: Template, triples: Sequence[Triple], signals: Signals) -> None:
        """Fit the stage, from its newest whole checkpoint if there is one, and save what it learnt."""
        settings, stage = self.settings, self.settings.stages[self.number]
        terms = settings.terms[self.number]
        log.info(
            "stage %d (%s: %s) starts from %s",
            self.number,
            settings.objective,
            ", ".join(sorted(terms)),
            self.adapters[-1] if self.adapters else settings.model.source,
        )
        module = self._module(policy)
        data = self._data(policy, template, triples)
        if stage.batch_size == "auto":
            data.batch_size = batch_size_of(newest(self.checkpoints)) or largest_batch(module, data)
        memory = "memory is not estimated where the weights are split"
        if not settings.split:
            memory = str(estimate(module, data, data.batch_size))
        log.info("stage %d: batches of %d; %s", self.number, data.batch_size, memory)
        steps = self._fit(module, data, signals)
        weights = whole_adapter(policy)
        if first():
            self._save(policy, weights, steps, len(triples), data.batch_size)
        module.trainer.strategy.barrier("the stage is saved")

    def _module(self, policy: Policy) -> POVIDModule:
        settings, stage = self.settings, self.settings.stages[self.number]
        cached = settings.plain.reference_cache
        if cached is None:
            cached = stage.epochs > 1
        return POVIDModule(
            policy,
            settings.objectives[self.number],
            stage,
            settings.terms[self.number],
            optimizer=make(settings.optimizer),
            schedule=make(settings.schedule),
            reference_cache=Path(settings.plain.outputs) / "reference_cache" if cached else None,
        )

    def _data(self, policy: Policy, template: Template, triples: Sequence[Triple]) -> PreferenceDataModule:
        settings, stage = self.settings, self.settings.stages[self.number]
        return PreferenceDataModule(
            triples,
            template,
            terms=settings.terms[self.number],
            distortion=settings.distortion,
            weigh=settings.objectives[self.number].token_weights,
            packable=policy.packable,
            batch_size=1 if stage.batch_size == "auto" else stage.batch_size,
            seed=settings.plain.seed,
            workers=settings.data.workers,
            cache_mb=settings.data.cache_mb,
            group_by_length=settings.data.group_by_length,
        )

    def _fit(self, module: POVIDModule, data: PreferenceDataModule, signals: Signals) -> int:
        """Returns the number of optimiser steps."""
        settings, stage = self.settings, self.settings.stages[self.number]
        checkpoint = newest(self.checkpoints)
        start = step_of(checkpoint) if checkpoint else 0
        if checkpoint:
            log.info("stage %d resumes after step %d: %s", self.number, start, checkpoint)
        metrics = MetricsFile(self.home / "metrics.csv", start)
        callbacks: list[L.Callback] = [make(node) for node in settings.callbacks.values()]
        callbacks += [
            metrics,
            FiniteLoss(self.number, self.checkpoints),
            Checkpoints(self.checkpoints, settings.checkpoint, signals, metrics),
        ]
        if not any(isinstance(callback, ProgressBar) for callback in callbacks):
            callbacks.append(TQDMProgressBar(refresh_rate=1))
        if self.number == settings.run_stages[0] and not settings.data.skip_bad:
            look = DataCheck(
                data.dataset.triples,
                settings.data.preferences,
                lambda triples: run_data.check(settings, triples),
            )
            callbacks.insert(0, look)
        loggers = make_loggers(settings.loggers, RunContext.of(settings, self.run, f"stage_{self.number}"))
        trainer = make(
            settings.trainer,
            max_epochs=stage.epochs,
            max_steps=stage.max_steps,
            accumulate_grad_batches=stage.accumulate,
            gradient_clip_val=stage.max_grad_norm,
            logger=loggers,
            default_root_dir=str(self.home),
            enable_checkpointing=False,
            callbacks=callbacks,
        )
        try:
            trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
        except BaseException as error:
            end_children(trainer)
            close(loggers, "failed")
            if loader_died(error):
                raise Fault(
                    f"stage {self.number}: a loader process died after step {trainer.global_step} "
                    f"({str(error).rstrip('. ')}), most likely because memory ran out; what was learnt is kept: resume "
                    f"with resume=latest and fewer processes, data.workers={settings.data.workers // 2}, or a smaller "
                    "data.cache_mb"
                ) from error
            raise
        close(loggers)
        return trainer.global_step

    def _save(self, policy: Policy, weights: Any, steps: int, records: int, batch_size: int) -> None:
        settings = self.settings
        with files.draft(self.adapter) as draft:
            policy.save_adapter(draft, weights)
        files.write_json(
            self.note,
            {
                "stage": self.number,
                "ablation": settings.ablation.name,
                "terms": sorted(settings.dispreferences(self.number)),
                "seed": settings.plain.seed,
                "fingerprint": fingerprint(settings, self.number),
                "init_from": [str(adapter) for adapter in self.adapters],
                "adapter": str(self.adapter),
                "steps": steps,
                "records": records,
                "batch_size": batch_size,
                "finished": datetime.now(UTC).isoformat(),
            },
        )
        shutil.rmtree(self.checkpoints, ignore_errors=True)


# Of the data settings, what changes no record and no batch of a stage.
_FREE_DATA = {"workers", "cache_mb", "split", "benchmarks", "pope_suffix", "objects", "synonyms"}


def fingerprint(settings: Settings, number: int) -> str:
    """Two stages with the same fingerprint would learn the same."""
    dispreferences = settings.dispreferences(number)
    return digest(
        {
            "model": settings.tree["model"],
            "data": {k: v for k, v in settings.tree["data"].items() if k not in _FREE_DATA},
            "dispreference": settings.tree["dispreference"] if "text" in dispreferences else None,
            "objective": settings.objective_node(number),
            "stage": settings.stages[number].model_dump(),
            "terms": sorted(settings.terms[number]),
            "noise": settings.tree["noise"] if settings.terms[number] & ON_DISTORTED else None,
            "optimizer": settings.optimizer,
            "schedule": settings.schedule,
            "callbacks": settings.callbacks,
            "seed": settings.plain.seed,
        }
    )


def digest(value: Any) -> str:
    """Sixteen hexadecimal digits that name a value made of plain containers."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def starting_adapters(settings: Settings) -> tuple[Path, ...]:
    """The adapters to begin with: the configured ones and, for stage 2 of an ablation with two, those of stage 1.

    Raises:
        Fault: no finished stage 1 matches, or ``init_from`` holds no adapter.
    """
    adapters = [Path(adapter) for adapter in settings.plain.adapters]
    if settings.plain.init_from is not None:
        return (*adapters, *adapter_chain(Path(settings.plain.init_from)))
    if settings.run_stages == (2,) and 1 in settings.ablation.stages:
        found = newest_stage(Path(settings.plain.outputs), fingerprint(settings, 1), 1)
        log.info("stage 2 starts from the newest matching stage 1: %s", found)
        return (*adapters, *adapter_chain(found))
    return tuple(adapters)


def newest_stage(outputs: Path, wanted: str, number: int) -> Path:
    """The newest finished stage with a fingerprint; Fault when there is none."""
    seen = []
    for file in outputs.glob(f"**/stage_{number}/stage.json"):
        try:
            stage = json.loads(file.read_text(encoding="utf-8"))
            seen.append((stage["finished"], stage["fingerprint"], file.parent))
        except (ValueError, KeyError, TypeError, OSError):
            log.warning("%s cannot be read and is skipped", file)
    matching = [entry for entry in seen if entry[1] == wanted]
    if not matching:
        others = f" ({len(seen)} with other settings are there, the newest is {max(seen)[2]})" if seen else ""
        raise Fault(
            f"{outputs} holds no finished stage {number} with this model, data, objective, seed and stage "
            f"settings{others}: run the same command with stage={number} first, or name one with init_from="
        )
    return max(matching)[2]
