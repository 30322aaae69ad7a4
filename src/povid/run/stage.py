"""One stage of a run: load the policy, fit it, save its adapter."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar

from povid import files
from povid.fault import Fault
from povid.model.adapters import adapter_chain, adapter_digest, check_adapter
from povid.model.generation import Answers
from povid.model.policy import Policy
from povid.model.template import Template
from povid.preferences.triple import Triple
from povid.run import data as run_data
from povid.run import evaluation
from povid.run.best import BestAdapter
from povid.run.build import make
from povid.run.checkpoint import Checkpoints, batch_size_of, identity_of, loader_died, newest, step_of
from povid.run.content import Content, of_stage
from povid.run.context import RunContext
from povid.run.guards import DataCheck, FiniteLoss
from povid.run.identity import Identity
from povid.run.loggers import Metrics, close, make_loggers
from povid.run.processes import device, first
from povid.run.resume import owned
from povid.run.samples import Samples
from povid.run.settings import Settings
from povid.run.signals import Signals
from povid.run.terminal import near, progress
from povid.run.watch import Validation, Watcher
from povid.terminal import show
from povid.training.datamodule import PreferenceDataModule
from povid.training.memory import Needs, fit, largest_batch
from povid.training.module import POVIDModule
from povid.training.sharding import whole_adapter

log = logging.getLogger(__name__)

LOG_EVERY = {False: 1, True: 10}  # steps, without and with a GPU, for which fetching the metrics means waiting


@dataclass(frozen=True)
class Stage:
    """Stage ``number`` of the run in ``run``: it starts from the model with ``adapters``, also its reference."""

    settings: Settings
    number: int
    run: Path
    adapters: tuple[Path, ...]
    identity: Identity
    watched: str | None = None  # what measures it while it trains (run/content.py)

    @property
    def home(self) -> Path:
        return self.run / f"stage_{self.number}"

    @property
    def note(self) -> Path:
        """Written last: a stage is finished if this file exists."""
        return self.home / "stage.json"

    @property
    def adapter(self) -> Path:
        return self.home / "adapter"

    @property
    def last_adapter(self) -> Path:
        """The adapter after the last step, where ``adapter`` is the best one (``checkpoint.best``)."""
        return self.home / "last_adapter"

    @property
    def checkpoints(self) -> Path:
        return self.home / "checkpoints"

    def finished(self) -> dict[str, Any] | None:
        """What its stage.json records; None while it is not finished.

        Raises:
            Fault: it was finished under another identity, its adapter was changed since, or a file is damaged.
        """
        if not self.note.exists():
            return None
        cure = f"restore it from a copy, or move {self.home} away to train the stage again"
        found = files.read_json(self.note, dict, cure, ("steps", "adapter", "adapter_digest"))
        files.read_json(self.adapter / "adapter_config.json", dict, cure)
        self.identity.check(
            found.get("identity"), f"the stage in {self.home}", "restore that to resume, or start in another folder"
        )
        check_adapter(self.adapter)
        return found

    def reuse(self) -> bool:
        """Take over what any run below ``outputs`` has computed under this identity; False if there is nothing."""
        for home in finished_stages(Path(self.settings.plain.outputs), self.number, self.identity.digest):
            taken = json.loads((home / "stage.json").read_text(encoding="utf-8"))
            if self.watched is not None and taken.get("watched") != self.watched:
                continue  # it was not measured while it trained, or something else was
            try:
                check_adapter(home / "adapter")
            except Fault as fault:
                log.warning("not used again: %s", fault)
                continue
            log.info("stage %d was computed already and is copied from %s", self.number, home)
            for file in home.glob("*.csv"):
                files.write_bytes(self.home / file.name, file.read_bytes())
            for adapter in (self.last_adapter, self.adapter):
                if (home / adapter.name).exists():
                    with files.draft(adapter) as draft:
                        shutil.copytree(home / adapter.name, draft)
            files.write_json(
                self.note,
                taken
                | self._places()
                | {"ablation": self.settings.ablation.name, "computed_in": str(home.parent.resolve())},
            )
            return True
        return False

    def _places(self) -> dict[str, Any]:
        """Where its adapters lie, relative to the run, so that the run can be moved."""
        return {
            "init_from": [os.path.relpath(adapter, self.run) for adapter in self.adapters],
            "adapter": os.path.relpath(self.adapter, self.run),
            "written_in": str(self.run.resolve()),
        }

    def load(self) -> tuple[Policy, Template]:
        """The policy with a fresh adapter, on this process's device or, where the trainer splits it, in memory."""
        L.seed_everything(self.settings.plain.seed, workers=True, verbose=False)
        policy = self.settings.model.policy(self.adapters, adapted=True)
        if not self.settings.split:
            policy = policy.to(device())
        return policy, self.settings.model.template(policy.processor)

    def train(
        self,
        policy: Policy,
        template: Template,
        triples: Sequence[Triple],
        held_out: Sequence[Triple],
        signals: Signals,
    ) -> None:
        """Fit the stage, from its newest intact checkpoint if there is one, and save its adapter."""
        settings, stage = self.settings, self.settings.stages[self.number]
        module = self._module(policy)
        data = self._data(policy, template, triples, held_out)
        if stage.batch_size == "auto":
            data.batch_size = batch_size_of(newest(self.checkpoints)) or largest_batch(module, data)
        needs = None if settings.split else fit(module, data, data.batch_size)
        if first():
            kept = "" if policy.recomputes else "; activations are kept unless model.gradient_checkpointing=true"
            memory = f"not estimated where the weights are split{kept}" if needs is None else str(needs)
            self._announce(len(triples), data.batch_size, memory)
        fitted = self._fit(module, data, template, signals)
        weights = whole_adapter(policy)
        if first():
            self._save(policy, weights, fitted, len(triples), data.batch_size, needs)
        module.trainer.strategy.barrier("the stage is saved")

    def _announce(self, records: int, batch_size: int, memory: str) -> None:
        settings, stage, trainer = self.settings, self.settings.stages[self.number], self.settings.trainer
        source = near(self.adapters[-1]) if self.adapters else settings.model.source
        batches = f"batches of {batch_size}" + (f", {stage.accumulate} to a step" if stage.accumulate > 1 else "")
        length = f"epochs: {stage.epochs}" + (f", at most {stage.max_steps} steps" if stage.max_steps > 0 else "")
        rows = [
            ("objective", f"{settings.objective}: {', '.join(sorted(settings.terms[self.number]))}"),
            ("model", f"{settings.model.name}, from {source}"),
            ("data", f"{settings.data.name}: {records} records in {batches}; {length}"),
            ("device", f"{device().type}, devices: {trainer.get('devices')}, precision {trainer.get('precision')}"),
            ("memory", memory),
        ]
        show(log, f"stage {self.number} of {settings.plain.row}, seed {settings.plain.seed}", rows)

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

    def _data(
        self, policy: Policy, template: Template, triples: Sequence[Triple], held_out: Sequence[Triple]
    ) -> PreferenceDataModule:
        settings, stage = self.settings, self.settings.stages[self.number]
        return PreferenceDataModule(
            triples,
            template,
            terms=settings.terms[self.number],
            distortion=settings.distortion,
            distorted_images=settings.objectives[self.number].distorted_images,
            weigh=settings.objectives[self.number].token_weights,
            packable=policy.packable,
            batch_size=1 if stage.batch_size == "auto" else stage.batch_size,
            seed=settings.plain.seed,
            workers=settings.data.workers,
            cache_mb=settings.data.cache_mb,
            group_by_length=settings.data.group_by_length,
            held_out=held_out,
        )

    def _samples(self, policy: Policy, template: Template, triples: Sequence[Triple]) -> Samples:
        settings = self.settings
        samples = evaluation.sample_questions(triples, settings.plain.samples)
        answers = Answers(policy, template, settings.generation.batch_size)
        before = evaluation.captions_before(self.run)

        def shown(captions: Sequence[str], noise: Mapping[str, Any]) -> tuple[list[dict[str, Any]], Any]:
            return evaluation.sample_records(settings, triples, samples, before or captions, captions, noise)

        return Samples(
            self.home,
            [sample.meta["record"] for sample in samples],
            settings.plain.samples_every,
            policy,
            lambda: evaluation.caption(answers, samples),
            shown,
        )

    def _fit(self, module: POVIDModule, data: PreferenceDataModule, template: Template, signals: Signals) -> Fitted:
        settings, stage = self.settings, self.settings.stages[self.number]
        checkpoint = newest(self.checkpoints)
        if checkpoint and checkpoint.is_file() and first():
            self.identity.check(
                identity_of(checkpoint),
                f"the checkpoint {checkpoint}",
                "restore that to resume, or start in another folder",
            )
        start = step_of(checkpoint) if checkpoint else 0
        if checkpoint:
            log.info("stage %d resumes after step %d: %s", self.number, start, checkpoint)
        metrics = Metrics(self.home / "metrics.csv", start)
        callbacks: list[L.Callback] = [make(node) for node in settings.callbacks.values()]
        if len(data.held_out):
            callbacks.append(Validation(self.home / "validation.csv", settings.validated(self.number), start))
        watchers = [callback for callback in callbacks if isinstance(callback, Watcher)]
        best = None
        if settings.checkpoint.best is not None:
            best = BestAdapter(self.home / "best", settings.checkpoint, watchers, self._start_of_guard())
            callbacks.append(best)
        callbacks += [
            FiniteLoss(self.number, self.checkpoints),
            metrics,
            Checkpoints(self.checkpoints, settings.checkpoint, signals, metrics, self.identity),
        ]
        if settings.plain.samples and not settings.split:
            shown = data.held_out if len(data.held_out) else data.dataset
            callbacks.append(self._samples(module.policy, template, shown.triples))
        wanted = settings.trainer.get("enable_progress_bar") is not False
        if wanted and not any(isinstance(callback, ProgressBar) for callback in callbacks):
            callbacks.append(progress(self.number))
        if self.number == settings.run_stages[0] and not settings.data.skip_bad:
            data_check = DataCheck(
                data.dataset.triples,
                settings.data.preferences,
                lambda triples: run_data.check(settings, triples),
                processes=max(settings.data.workers, 1),
            )
            callbacks.insert(0, data_check)
        loggers = make_loggers(settings.loggers, RunContext.of(settings, self.run, self.home.name, start))
        trainer = make(
            {name: value for name, value in settings.trainer.items() if name != "log_every_n_steps"}
            | validation_arguments(settings.trainer, len(data.held_out)),
            max_epochs=stage.epochs,
            max_steps=stage.max_steps,
            accumulate_grad_batches=stage.accumulate,
            gradient_clip_val=stage.max_grad_norm,
            logger=loggers,
            log_every_n_steps=settings.trainer.get("log_every_n_steps") or LOG_EVERY[device().type == "cuda"],
            default_root_dir=str(self.home),
            enable_checkpointing=False,
            callbacks=callbacks,
        )
        try:
            trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
        except BaseException as error:
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
        steps = trainer.global_step
        latest = {name: value for watcher in watchers if watcher.latest for name, value in watcher.latest[1].items()}
        if best is None:
            return Fitted(steps, latest)
        if best.kept:
            log.info("stage %d continues with the adapter of step %d of %d", self.number, best.kept["step"], steps)
        return Fitted(steps, best.kept["measured"] if best.kept else latest, best.record(), best.adapter)

    def _start_of_guard(self) -> float | None:
        """The guard metric as it was before the stage that this one starts from; None if that is not recorded."""
        if not self.adapters:
            return None
        try:
            note = json.loads((self.adapters[-1].parent / "stage.json").read_text(encoding="utf-8"))
            kept = note["kept"]
            return float(kept["start"]) if kept["guard"] == self.settings.checkpoint.guard else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _save(
        self, policy: Policy, weights: Any, fitted: Fitted, records: int, batch_size: int, needs: Needs | None
    ) -> None:
        settings = self.settings
        with files.draft(self.adapter if fitted.best is None else self.last_adapter) as draft:
            policy.save_adapter(draft, weights)
        if fitted.best is not None:
            with files.draft(self.adapter) as draft:
                shutil.copytree(fitted.best, draft)
        files.write_json(
            self.note,
            {
                "stage": self.number,
                "ablation": settings.ablation.name,
                "terms": sorted(settings.dispreferences(self.number)),
                "seed": settings.plain.seed,
                "identity": self.identity.record(),
                "adapter_digest": adapter_digest(self.adapter),
                **self._places(),
                **({"watched": self.watched} if self.watched is not None else {}),
                **({"measured": fitted.measured} if fitted.measured else {}),
                **({"kept": fitted.kept} if fitted.kept is not None else {}),
                "steps": fitted.steps,
                "records": records,
                "batch_size": batch_size,
                "gradient_checkpointing": policy.recomputes,
                **({"memory": needs.record()} if needs is not None else {}),
                "finished": datetime.now(UTC).isoformat(),
            },
        )
        for left in (self.checkpoints, self.home / "best"):
            shutil.rmtree(left, ignore_errors=True)


@dataclass(frozen=True)
class Fitted:
    """A stage that has been fitted: optimizer steps, what was measured of the adapter that it hands on, and, with
    ``checkpoint.best``, which adapter that is and the folder of the best one if there is one."""

    steps: int
    measured: dict[str, float]
    kept: dict[str, Any] | None = None
    best: Path | None = None


def validation_arguments(trainer: Mapping[str, Any], held_out: int) -> dict[str, Any]:
    """The arguments of a trainer that decide when it validates; never, without held-out records.

    A number of batches between two validations counts over all epochs, as Lightning does without
    ``check_val_every_n_epoch``. Inference mode would leave tensors behind that sharded weights cannot use.
    """
    if not held_out:
        return {"limit_val_batches": 0, "num_sanity_val_steps": 0}
    found: dict[str, Any] = {"num_sanity_val_steps": 0, "inference_mode": False}
    if isinstance(trainer.get("val_check_interval"), int) and "check_val_every_n_epoch" not in trainer:
        found["check_val_every_n_epoch"] = None
    return found


def starting_adapters(settings: Settings, content: Content) -> tuple[Path, ...]:
    """The adapters to begin with: the configured ones and, for stage 2 of an ablation with two, those of stage 1.

    Raises:
        Fault: no finished stage 1 matches, or ``init_from`` holds no adapter.
    """
    adapters = [Path(adapter) for adapter in settings.plain.adapters]
    if settings.plain.init_from is not None:
        return (*adapters, *adapter_chain(Path(settings.plain.init_from)))
    if settings.run_stages == (2,) and 1 in settings.ablation.stages:
        found = newest_stage(Path(settings.plain.outputs), of_stage(settings, 1, adapters, content), 1)
        log.info("stage 2 starts from the newest matching stage 1: %s", found)
        return tuple(adapter_chain(found))
    return tuple(adapters)


def newest_stage(outputs: Path, wanted: Identity, number: int) -> Path:
    """The newest finished stage with an identity; Fault, naming what differs in the newest one, when there is none."""
    matching = finished_stages(outputs, number, wanted.digest)
    if matching:
        return matching[0]
    others = finished_stages(outputs, number)
    cure = f"run the same command with stage={number} first, or name one with init_from="
    if others:
        recorded = json.loads((others[0] / "stage.json").read_text(encoding="utf-8"))["identity"]
        wanted.check(recorded, f"{outputs} holds no finished stage {number} that fits: the newest, {others[0]},", cure)
    raise Fault(f"{outputs} holds no finished stage {number}; {cure}")


def finished_stages(outputs: Path, number: int, digest: str | None = None) -> list[Path]:
    """The folders of the finished stages ``number`` below ``outputs``, of one identity or of any, the newest first.

    Those of other users are left out: what is used unasked must be the user's own.
    """
    seen = []
    for file in outputs.glob(f"**/stage_{number}/stage.json"):
        try:
            stage = json.loads(file.read_text(encoding="utf-8"))
            finished, found = stage["finished"], stage["identity"]["digest"]
            if digest in (None, found) and not owned(file.parent, *file.parent.rglob("*")):
                log.warning(
                    "%s belongs to another user and is not used; to use it, name it with init_from=", file.parent
                )
            else:
                seen.append((finished, found, file.parent))
        except (ValueError, KeyError, TypeError, OSError):
            log.warning("%s cannot be used: it is damaged, or an earlier version wrote it", file)
    return [folder for _, found, folder in sorted(seen, reverse=True) if digest in (None, found)]
