"""A run: the stages of an ablation, one after the other, then the benchmarks, then results.json."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning as L
from hydra.utils import instantiate
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import WandbLogger
from omegaconf import DictConfig, OmegaConf, open_dict

from povid.benchmarks import suite
from povid.fault import Fault
from povid.machine import keep_freed_memory, packages, versions
from povid.model.adapters import adapter_chain
from povid.model.generation import Answers
from povid.model.policy import ModelSettings, Policy, load_processor
from povid.model.question import Answerer, Decoding, Question
from povid.model.served import ServedModel
from povid.model.template import Template
from povid.preferences.check import Report
from povid.preferences.check import check as check_records
from povid.preferences.formats import read
from povid.preferences.pictures import open_picture
from povid.preferences.triple import Triple
from povid.run.checkpoint import Checkpoints, batch_size_of, newest, step_of, sync
from povid.run.guards import DataCheck, FiniteLoss, full_disk_told, refuse
from povid.run.loggers import MetricsFile, close, wandb_logger
from povid.run.processes import device, end_children, first, leave_group, one_job, wait_for
from povid.run.resume import compare
from povid.run.settings import Checked, check
from povid.training.datamodule import PreferenceDataModule
from povid.training.memory import estimate, largest_batch
from povid.training.module import POVIDModule
from povid.training.sharding import whole_adapter

log = logging.getLogger(__name__)

for _chatty in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch"):
    logging.getLogger(_chatty).setLevel(logging.WARNING)

CHECKED_AT_START = 32  # records; the others are looked at while the first epoch trains


def run(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """Train the stages that the configuration asks for, answer its benchmarks, write ``folder/results.json``.

    With ``resume`` a folder is gone on with: what is finished there stays, and a stage that was interrupted continues
    from its newest checkpoint. Returns what stands in results.json; in the further processes of a run on several
    devices, which only train, nothing.

    Raises:
        Fault: everything that a user can mend; a finished stage stays in its folder whatever happens after it.
        Stopped: the run was told to stop and has saved what it was doing.
    """
    if "benchmarks" not in cfg:  # what Hydra makes of benchmarks=[]
        with open_dict(cfg):
            cfg.benchmarks = {}
    checked = check(cfg)
    with full_disk_told(folder), one_job(folder):
        started = datetime.now(UTC).isoformat(timespec="seconds")
        if first():
            _claim(folder, cfg)
            if (folder / "results.json").exists():
                log.info("finished already: %s", folder)
                return json.loads((folder / "results.json").read_text())
        keep_freed_memory()
        timings: dict[str, float] = {}
        with _timed(timings, "prepare"):
            triples = _prepare(cfg, checked, folder)
        samples = sample_questions(triples, cfg.samples)
        adapters = _start(cfg, checked)
        stages: dict[str, Any] = {}
        for number in checked.run_stages:
            done = folder / f"stage_{number}" / "stage.json"
            if done.exists():
                log.info("stage %d is finished already: %s", number, done.parent)
            else:
                train_stage(cfg, checked, number, triples, adapters, folder, timings, samples)
            stages[str(number)] = json.loads(done.read_text())
            adapters = [*adapters, done.parent / "adapter"]
        if not first():
            return {}
        leave_group()
        return evaluate(cfg, checked, folder, triples, samples, adapters, stages, timings, started)


def _prepare(cfg: DictConfig, checked: Checked, folder: Path) -> list[Triple]:
    """Data and benchmarks made ready and looked at, and the folder's record of what is run; then the triples."""
    settled = folder / "config.yaml"
    if not first():
        wait_for(settled)
    else:
        for made in (checked.data.prepare, getattr(checked.model, "prepare", None)):
            if made:
                instantiate(made)
    if first():
        _check_benchmarks(cfg, checked)
    triples = load_triples(checked, cfg.seed) if checked.run_stages or cfg.samples else []
    if first():
        if checked.run_stages and not checked.data.skip_bad:
            refuse(
                check_records(
                    triples,
                    sample=CHECKED_AT_START,
                    limit=checked.model.max_length,
                    tokens=prompt_tokens(checked.model),
                ),
                checked.data.preferences,
            )
        _write(folder / "packages.txt", packages())
        _write(settled, OmegaConf.to_yaml(cfg, resolve=True))
    return triples


def evaluate(
    cfg: DictConfig,
    checked: Checked,
    folder: Path,
    triples: Sequence[Triple],
    samples: Sequence[Question],
    adapters: Sequence[Path],
    stages: dict[str, Any],
    timings: dict[str, float],
    started: str,
) -> dict[str, Any]:
    """Answer the benchmarks with what the adapters make of the model, write results.json and the page of captions."""
    with _timed(timings, "evaluate"):
        answers = _answerer(cfg, checked, adapters)
        served = isinstance(checked.model, ServedModel)
        settings = checked.model.model_dump(mode="json") if served else asdict(checked.model)
        model = fingerprint({"model": settings, "adapters": [_digest(a) for a in adapters]})
        benchmarks = suite.run(_selection(cfg), answers, folder / "benchmarks", judge(cfg), model=f"povid-{model}")
        after = _caption(answers, samples)
    before = _before(folder, samples)
    results = {
        "row": cfg.row,
        "ablation": checked.ablation.name,
        "stage": cfg.stage,
        "seed": cfg.seed,
        "objective": checked.objective.name,
        "noise": {"schedule": checked.noise.schedule, "step": checked.noise.step, "space": checked.noise.space},
        "model": checked.model.name,
        "data": checked.data.name,
        "dispreference": checked.dispreference,
        "experiment": _choice("experiment"),
        "settings": {
            "objective": asdict(checked.objective),
            "noise": asdict(checked.noise),
            "stages": {str(n): asdict(checked.stages[n]) for n in checked.run_stages},
        },
        "benchmarks": benchmarks,
        "decoding": {name: scores["decoding"] for name, scores in benchmarks.items() if "decoding" in scores},
        "stages": stages,
        "adapters": [str(adapter) for adapter in adapters],
        "versions": versions(),
        "timings": {name: round(seconds, 2) for name, seconds in timings.items()},
        "started": started,
    }
    _report(cfg, checked, folder, results, triples, before or after, after)
    _write(folder / "results.json", json.dumps(results, indent=1) + "\n")
    log.info("results: %s", folder / "results.json")
    return results


# --- stages ----------------------------------------------------------------------------------------------------------


def train_stage(
    cfg: DictConfig,
    checked: Checked,
    number: int,
    triples: Sequence[Triple],
    adapters: Sequence[Path],
    folder: Path,
    timings: dict[str, float],
    samples: Sequence[Question],
) -> None:
    """Fit one stage from the policy that ``adapters`` make, which is its reference too, and save what it learnt."""
    home, stage = folder / f"stage_{number}", checked.stages[number]
    terms = frozenset(stage.dispreferences) & frozenset(checked.ablation.dispreferences)
    log.info(
        "stage %d (%s, %s) starts from %s",
        number,
        checked.objective.name,
        " and ".join(sorted(terms)),
        adapters[-1] if adapters else checked.model.source,
    )
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    with _timed(timings, f"stage_{number}.load"):
        policy, template = load_policy(checked.model, adapters, adapted=True, whole=not checked.split)
        if number == checked.run_stages[0] and first() and not checked.split:
            _before(folder, samples, Answers(policy, template, cfg.generation.batch_size))
        cached = stage.epochs > 1 if cfg.reference_cache is None else cfg.reference_cache
        module = POVIDModule(
            policy, checked.objective, stage, terms, Path(cfg.outputs) / "reference_cache" if cached else None
        )
        noise = checked.noise if "noise" in terms and checked.objective.name != "preferred_only" else None
        data = PreferenceDataModule(
            triples,
            template,
            noise=noise,
            text="text" in terms and checked.objective.name != "preferred_only",
            packable=policy.packable,
            batch_size=1 if stage.batch_size == "auto" else stage.batch_size,
            seed=cfg.seed,
            workers=checked.data.workers,
            cache_mb=checked.data.cache_mb,
            group_by_length=checked.data.group_by_length,
        )
        if stage.batch_size == "auto":
            data.batch_size = batch_size_of(newest(home / "checkpoints")) or largest_batch(module, data)
        log.info(
            "stage %d: batches of %d; %s",
            number,
            data.batch_size,
            "memory: the weights are split, and what a step takes is not measured beforehand"
            if checked.split
            else estimate(module, data, data.batch_size),
        )
    with _timed(timings, f"stage_{number}.fit"):
        steps = fit(cfg, checked, number, module, data, folder)
    weights = whole_adapter(policy)
    if first():
        with _saved(home / "adapter") as draft:
            policy.save_adapter(draft, weights)
        _write(
            home / "stage.json",
            json.dumps(
                {
                    "stage": number,
                    "ablation": checked.ablation.name,
                    "terms": sorted(terms),
                    "seed": cfg.seed,
                    "fingerprint": stage_fingerprint(cfg, checked, number),
                    "init_from": [str(a) for a in adapters],
                    "adapter": str(home / "adapter"),
                    "steps": steps,
                    "records": len(triples),
                    "batch_size": data.batch_size,
                    "finished": datetime.now(UTC).isoformat(),
                },
                indent=1,
            ),
        )
        shutil.rmtree(home / "checkpoints", ignore_errors=True)
    module.trainer.strategy.barrier("the stage is saved")


def fit(
    cfg: DictConfig, checked: Checked, number: int, module: POVIDModule, data: PreferenceDataModule, folder: Path
) -> int:
    """Train a stage, from its newest whole checkpoint if there is one. Returns the number of optimiser steps."""
    home, stage = folder / f"stage_{number}", checked.stages[number]
    checkpoint = newest(home / "checkpoints")
    begin = step_of(checkpoint) if checkpoint else 0
    if checkpoint:
        log.info("stage %d goes on after step %d: %s", number, begin, checkpoint)
    metrics = MetricsFile(home / "metrics.csv", begin)
    loggers = _wandb(cfg, checked, folder, f"stage_{number}")
    callbacks = [
        metrics,
        FiniteLoss(number, home / "checkpoints"),
        Checkpoints(home / "checkpoints", checked.checkpoint, metrics),
        TQDMProgressBar(refresh_rate=1),
    ]
    if number == checked.run_stages[0] and not checked.data.skip_bad:
        tokens = prompt_tokens(checked.model)
        callbacks.insert(
            0,
            DataCheck(
                data.dataset.triples,
                checked.data.preferences,
                lambda triples: check_records(triples, limit=checked.model.max_length, tokens=tokens),
            ),
        )
    trainer = instantiate(
        checked.trainer,
        max_epochs=stage.epochs,
        max_steps=stage.max_steps,
        accumulate_grad_batches=stage.accumulate,
        gradient_clip_val=stage.max_grad_norm,
        logger=loggers,
        default_root_dir=str(home),
        enable_checkpointing=False,
        callbacks=callbacks,
    )
    try:
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    except BaseException:
        end_children(trainer)
        close(loggers, "failed")
        raise
    close(loggers)
    return trainer.global_step


def _answerer(cfg: DictConfig, checked: Checked, adapters: Sequence[Path]) -> Answerer:
    """Who answers: a server, or the model with its adapters."""
    if isinstance(checked.model, ServedModel):
        return checked.model.answerer()
    policy, template = load_policy(checked.model, adapters)
    return Answers(policy, template, cfg.generation.batch_size, cfg.seed)


def load_policy(
    settings: ModelSettings, adapters: Sequence[Path], *, adapted: bool = False, whole: bool = True
) -> tuple[Policy, Template]:
    """Policy and template; on this process's device if it is to be there ``whole``, else in the machine's memory."""
    policy = Policy.load(settings, adapters=adapters, adapted=adapted)
    return policy.to(device()) if whole else policy, _template(policy.processor, settings)


def _template(processor: Any, settings: ModelSettings) -> Template:
    return Template(
        processor,
        style=settings.style,
        system=settings.system,
        pad_square=settings.pad_square,
        max_length=settings.max_length,
    )


def _path(name: str | None) -> Path | None:
    return Path(name) if name is not None else None


def load_triples(checked: Checked, seed: int = 0) -> list[Triple]:
    """The preference records of the configuration, rewritten by ``seed`` where it says so.

    With ``data.skip_bad`` those that can be used, the rest counted.
    """
    skipped: list[str] | None = [] if checked.data.skip_bad else None
    triples = read(checked.data.format, Path(checked.data.preferences), Path(checked.data.images), skipped)
    if checked.dispreference == "cooccurrence":
        from povid.dispreference.cooccurrence import instead

        triples = instead(
            triples,
            seed,
            objects=_path(checked.data.objects),
            synonyms=_path(checked.data.synonyms),
            limit=checked.data.limit,
            skipped=skipped,
        )
    triples = triples[: checked.data.limit]
    if skipped is not None:
        report: Report = check_records(triples, limit=checked.model.max_length, tokens=prompt_tokens(checked.model))
        bad = report.bad
        triples = [triple for triple in triples if triple.id not in bad]
        told = skipped + [finding.text for finding in report.findings]
        if told:
            log.warning(
                "%d records are left out (data.skip_bad):\n  - %s", len(skipped) + len(bad), "\n  - ".join(told)
            )
    return triples


def prompt_tokens(settings: ModelSettings) -> Callable[[Triple], int]:
    """Counts the tokens of a record's prompt, image included, as training will; with a processor of its own."""
    template = _template(load_processor(settings), settings)

    def count(triple: Triple) -> int:
        try:
            return len(template.see(template.prompt(triple.question), template.picture(open_picture(triple.image)))[0])
        except Fault:  # the picture's fault is told of by itself
            return 0

    return count


def stage_fingerprint(cfg: DictConfig, checked: Checked, number: int) -> str:
    """Two stages with the same fingerprint would learn the same."""
    terms = sorted(set(checked.stages[number].dispreferences) & set(checked.ablation.dispreferences))
    data = {
        key: value
        for key, value in asdict(checked.data).items()
        if key not in ("workers", "cache_mb", "split", "benchmarks", "pope_suffix", "objects", "synonyms")
    }
    if checked.dispreference != "given" and "text" in terms:
        data["dispreference"] = [checked.dispreference, checked.data.objects, checked.data.synonyms]
    return fingerprint(
        {
            "model": asdict(checked.model),
            "data": data,
            "objective": asdict(checked.objective),
            "stage": asdict(checked.stages[number]),
            "terms": terms,
            "seed": cfg.seed,
            "noise": asdict(checked.noise) if "noise" in terms else None,
        }
    )


def fingerprint(settings: Any) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _digest(adapter: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(adapter.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _start(cfg: DictConfig, checked: Checked) -> list[Path]:
    """The adapters to begin with: the configured ones and, for stage 2 of an ablation with two, those of stage 1."""
    adapters = [Path(adapter) for adapter in cfg.adapters]
    if cfg.init_from is not None:
        return adapters + adapter_chain(Path(cfg.init_from))
    if checked.run_stages == (2,) and 1 in checked.ablation.stages:
        found = newest_stage(Path(cfg.outputs), stage_fingerprint(cfg, checked, 1), 1)
        log.info("stage 2 starts from the newest matching stage 1: %s", found)
        return adapters + adapter_chain(found)
    return adapters


def newest_stage(outputs: Path, wanted: str, number: int) -> Path:
    """The newest finished stage with a fingerprint; Fault when there is none."""
    seen = []
    for file in outputs.glob(f"**/stage_{number}/stage.json"):
        try:
            stage = json.loads(file.read_text())
            seen.append((stage["finished"], stage["fingerprint"], file.parent))
        except (ValueError, KeyError, OSError):
            log.warning("%s cannot be read and is passed over", file)
    matching = [entry for entry in seen if entry[1] == wanted]
    if not matching:
        others = f"; {len(seen)} with other settings are there, the newest is {max(seen)[2]}" if seen else ""
        raise Fault(
            f"{outputs} holds no finished stage {number} with this model, data, objective, seed and stage "
            f"settings{others}: run the same command with stage={number} first, or name one with init_from="
        )
    return max(matching)[2]


# --- evaluation and reports ------------------------------------------------------------------------------------------


def judge(cfg: DictConfig) -> Any:
    """The configured judge, or None where there is none."""
    return instantiate(cfg.judge) if cfg.get("judge") else None


def _selection(cfg: DictConfig) -> dict[str, dict[str, Any]]:
    return OmegaConf.to_container(cfg.benchmarks, resolve=True) or {}


def _check_benchmarks(cfg: DictConfig, checked: Checked) -> None:
    for name, lack in suite.check(_selection(cfg), judge(cfg)).items():
        log.warning("%s will not be scored: %s (%s)", name, lack["missing"], lack["cure"])


def sample_questions(triples: Sequence[Triple], count: int) -> list[Question]:
    """The first records with long answers, to be captioned before and after training."""
    longest = sorted(range(len(triples)), key=lambda i: (len(triples[i].preferred[1].text) < 40, i))[:count]
    return [Question(triples[i].id, triples[i].image, triples[i].question, {"record": i}) for i in longest]


def _caption(answers: Answerer, samples: Sequence[Question]) -> list[str]:
    texts = dict(answers(samples, Decoding(max_new_tokens=96))) if samples else {}
    return [texts[i] for i in range(len(samples))]


def _before(folder: Path, samples: Sequence[Question], answers: Answers | None = None) -> list[str]:
    """The captions before training; made by ``answers`` and kept on disk, since a resumed run has no such policy."""
    file = folder / "captions_before.json"
    if answers is not None and samples and not file.exists():
        _write(file, json.dumps(_caption(answers, samples)))
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else []


def _report(
    cfg: DictConfig,
    checked: Checked,
    folder: Path,
    results: dict[str, Any],
    triples: Sequence[Triple],
    before: Sequence[str],
    after: Sequence[str],
) -> None:
    """The dashboard's run of the evaluation: benchmark figures and the table of captions."""
    from povid.benchmarks.chair_words import objects, read_synonyms
    from povid.report import dashboards

    samples = sample_questions(triples, cfg.samples)
    records = []
    for sample, was, now in zip(samples, before, after):
        triple, number = triples[sample.meta["record"]], sample.meta["record"]
        picture = open_picture(triple.image)
        records.append(
            {
                "id": triple.id,
                "image": picture,
                "question": triple.question,
                "before": was,
                "after": now,
                "noised": checked.noise.distort_picture(picture, seed=cfg.seed, epoch=0, record=number),
                "preferred": triple.preferred[-1].text,
                "dispreferred": triple.dispreferred[-1].text,
                "objects": triple.meta.get("objects"),
            }
        )
    synonyms = Path(checked.data.benchmarks or "") / "synonyms.txt"
    known = read_synonyms(synonyms) if synonyms.is_file() else None
    find = (lambda text: objects(text, known)) if known else None
    table = dashboards.table_rows(records, find)
    if records:
        dashboards.write_page(table, folder / "captions.html")
    for logger in _wandb(cfg, checked, folder, "evaluate"):
        figures = {
            f"{name}/{key}": value
            for name, scores in results["benchmarks"].items()
            for key, value in scores.items()
            if isinstance(value, (int, float))
        }
        logger.experiment.summary.update(figures)
        if records:
            dashboards.log_table(logger.experiment, table)
        close([logger])


def _wandb(cfg: DictConfig, checked: Checked, folder: Path, job: str) -> list[WandbLogger]:
    """The W&B run of one job, where it is wanted."""
    if not cfg.logger.wandb:
        return []
    return [
        wandb_logger(
            folder,
            job,
            project=cfg.logger.project,
            entity=cfg.logger.entity,
            mode=cfg.logger.mode,
            tags=[cfg.row, checked.objective.name, checked.model.name, checked.data.name],
            config=OmegaConf.to_container(cfg, resolve=True),
        )
    ]


# --- files -----------------------------------------------------------------------------------------------------------


def _claim(folder: Path, cfg: DictConfig) -> None:
    """Make the folder this run's own, or the run that lies there this one; a requeued cluster job always goes on."""
    taken = [
        name for name in ("results.json", "config.yaml", "stage_1", "stage_2", "benchmarks") if (folder / name).exists()
    ]
    requeued = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
    if taken and not (cfg.resume or requeued):
        raise Fault(
            f"{folder} holds a run already ({', '.join(taken)}); choose another hydra.run.dir, or go on with "
            "it by resume=true"
        )
    if (folder / "config.yaml").exists():
        compare(folder / "config.yaml", OmegaConf.to_container(cfg, resolve=True))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / ".writable", "1")
        (folder / ".writable").unlink()
    except OSError as error:
        raise Fault(
            f"{folder} cannot be written ({error.strerror}); free space or choose another hydra.run.dir"
        ) from None


def _write(file: Path, text: str) -> None:
    """All or nothing."""
    draft = file.with_name(f".{file.name}.part")
    with draft.open("w", encoding="utf-8") as sink:
        sink.write(text)
        sink.flush()
        os.fsync(sink.fileno())
    os.replace(draft, file)


@contextmanager
def _saved(folder: Path) -> Iterator[Path]:
    """A folder that is there whole or not at all; what an attempt that came to no end left in its place goes."""
    draft = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(draft, ignore_errors=True)
    yield draft
    for file in draft.rglob("*"):
        sync(file)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(draft, folder)
    sync(folder.parent)


@contextmanager
def _timed(timings: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    timings[name] = time.perf_counter() - start


def _choice(group: str) -> str | None:
    from hydra.core.hydra_config import HydraConfig

    return HydraConfig.get().runtime.choices.get(group) if HydraConfig.initialized() else None
