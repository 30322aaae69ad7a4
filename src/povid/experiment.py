"""A run: the stages of an ablation, one after the other, then the benchmarks, then results.json."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from omegaconf import DictConfig, OmegaConf

from povid.benchmarks import suite
from povid.benchmarks.question import Decoding, Question
from povid.config_check import Checked, check
from povid.fault import Fault
from povid.generation import Answers
from povid.machine import keep_freed_memory, packages, versions
from povid.module import POVIDModule
from povid.policy import ModelSettings, Policy
from povid.preferences.datamodule import PreferenceDataModule
from povid.preferences.formats import read
from povid.preferences.template import Template
from povid.preferences.triple import Triple

log = logging.getLogger(__name__)


def run(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """Train the stages that the configuration asks for, answer its benchmarks, write ``folder/results.json``.

    Returns what stands in results.json.

    Raises:
        Fault: everything that a user can mend; a finished stage stays in its folder whatever happens after it.
    """
    checked = check(cfg)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    _claim(folder, resume=bool(cfg.resume))
    keep_freed_memory()
    timings: dict[str, float] = {}
    with _timed(timings, "prepare"):
        if checked.data.prepare:
            instantiate(checked.data.prepare)
        _check_benchmarks(cfg, checked)
        triples = load_triples(checked) if checked.run_stages or cfg.samples else []
    _write(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
    _write(folder / "packages.txt", packages())

    adapters = _start(cfg, checked)
    samples = sample_questions(triples, cfg.samples)
    before: list[str] = []
    stages: dict[str, Any] = {}
    for number in checked.run_stages:
        done = folder / f"stage_{number}" / "stage.json"
        if done.exists():
            log.info("stage %d is finished already: %s", number, done.parent)
        else:
            train_stage(cfg, checked, number, triples, adapters, folder, timings, before, samples)
        stages[str(number)] = json.loads(done.read_text())
        adapters = [*adapters, done.parent / "adapter"]

    with _timed(timings, "evaluate"):
        policy, template = load_policy(checked.model, adapters)
        answers = Answers(policy, template, cfg.generation.batch_size, cfg.seed)
        model = fingerprint({"model": asdict(checked.model), "adapters": [_digest(a) for a in adapters]})
        benchmarks = suite.run(_selection(cfg), answers, folder / "benchmarks", judge(cfg), model=f"povid-{model}")
        after = _caption(answers, samples)
    results = {
        "row": cfg.row,
        "ablation": checked.ablation.name,
        "stage": cfg.stage,
        "seed": cfg.seed,
        "objective": checked.objective.name,
        "noise": {"schedule": checked.noise.schedule, "step": checked.noise.step, "space": checked.noise.space},
        "model": checked.model.name,
        "data": checked.data.name,
        "experiment": _choice("experiment"),
        "settings": {"objective": asdict(checked.objective), "noise": asdict(checked.noise),
                     "stages": {str(n): asdict(checked.stages[n]) for n in checked.run_stages}},
        "benchmarks": benchmarks,
        "decoding": {name: scores["decoding"] for name, scores in benchmarks.items() if "decoding" in scores},
        "stages": stages,
        "adapters": [str(adapter) for adapter in adapters],
        "versions": versions(),
        "timings": {name: round(seconds, 2) for name, seconds in timings.items()},
        "started": started,
    }
    _write(folder / "results.json", json.dumps(results, indent=1) + "\n")
    _report(cfg, checked, folder, results, triples, before or after, after)
    log.info("results: %s", folder / "results.json")
    return results


# --- stages ----------------------------------------------------------------------------------------------------------


def train_stage(cfg: DictConfig, checked: Checked, number: int, triples: Sequence[Triple], adapters: Sequence[Path],
                folder: Path, timings: dict[str, float], before: list[str], samples: Sequence[Question]) -> None:
    """Fit one stage from the policy that ``adapters`` make, which is its reference too, and save what it learnt."""
    home, stage = folder / f"stage_{number}", checked.stages[number]
    terms = frozenset(stage.dispreferences) & frozenset(checked.ablation.dispreferences)
    log.info("stage %d (%s, %s) starts from %s", number, checked.objective.name, " and ".join(sorted(terms)),
             adapters[-1] if adapters else checked.model.source)
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    with _timed(timings, f"stage_{number}.load"):
        policy, template = load_policy(checked.model, adapters, adapted=True)
        if samples and not before and number == checked.run_stages[0]:
            before += _caption(Answers(policy, template, cfg.generation.batch_size), samples)
        cached = stage.epochs > 1 if cfg.reference_cache is None else cfg.reference_cache
        module = POVIDModule(policy, checked.objective, stage, terms,
                             Path(cfg.outputs) / "reference_cache" if cached else None)
        noise = checked.noise if "noise" in terms and checked.objective.name != "preferred_only" else None
        data = PreferenceDataModule(
            triples, template, noise=noise, text="text" in terms and checked.objective.name != "preferred_only",
            packable=policy.packable, batch_size=stage.batch_size, seed=cfg.seed, workers=checked.data.workers,
            cache_mb=checked.data.cache_mb, group_by_length=checked.data.group_by_length,
        )
    with _timed(timings, f"stage_{number}.fit"):
        loggers = _loggers(cfg, checked, folder, f"stage_{number}")
        trainer = instantiate(
            cfg.trainer, max_epochs=stage.epochs, max_steps=stage.max_steps, accumulate_grad_batches=stage.accumulate,
            gradient_clip_val=stage.max_grad_norm, logger=loggers, default_root_dir=str(home),
            enable_checkpointing=False, callbacks=[TQDMProgressBar(refresh_rate=1)],
        )
        trainer.fit(module, data)
    _close(loggers)
    with _saved(home / "adapter") as draft:
        policy.save_adapter(draft)
    _write(home / "stage.json", json.dumps({
        "stage": number, "ablation": checked.ablation.name, "terms": sorted(terms), "seed": cfg.seed,
        "fingerprint": stage_fingerprint(cfg, checked, number), "init_from": [str(a) for a in adapters],
        "adapter": str(home / "adapter"), "steps": trainer.global_step,
        "records": len(triples), "finished": datetime.now(UTC).isoformat(),
    }, indent=1))


def load_policy(settings: ModelSettings, adapters: Sequence[Path], *, adapted: bool = False) -> tuple[Policy, Template]:
    """Policy and template on the device that Lightning would choose."""
    policy = Policy.load(settings, adapters=adapters, adapted=adapted)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    template = Template(policy.processor, style=settings.style, system=settings.system,
                        pad_square=settings.pad_square, max_length=settings.max_length)
    return policy.to(device), template


def load_triples(checked: Checked) -> list[Triple]:
    """The preference records of the configuration."""
    skipped: list[str] | None = [] if checked.data.skip_bad else None
    triples = read(checked.data.format, Path(checked.data.preferences), Path(checked.data.images), skipped)
    if skipped:
        log.warning("%d records were skipped, the first because: %s", len(skipped), skipped[0])
    return triples[: checked.data.limit]


def stage_fingerprint(cfg: DictConfig, checked: Checked, number: int) -> str:
    """Two stages with the same fingerprint would learn the same."""
    terms = sorted(set(checked.stages[number].dispreferences) & set(checked.ablation.dispreferences))
    data = {key: value for key, value in asdict(checked.data).items() if key not in ("workers", "cache_mb", "split",
                                                                                     "benchmarks", "pope_suffix")}
    return fingerprint({"model": asdict(checked.model), "data": data, "objective": asdict(checked.objective),
                        "stage": asdict(checked.stages[number]), "terms": terms, "seed": cfg.seed,
                        "noise": asdict(checked.noise) if "noise" in terms else None})


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
        raise Fault(f"{outputs} holds no finished stage {number} with this model, data, objective, seed and stage "
                    f"settings{others}: run the same command with stage={number} first, or name one with init_from=")
    return max(matching)[2]


def adapter_chain(place: Path) -> list[Path]:
    """All adapters that make up the policy in a run folder, a stage folder or an adapter folder."""
    if place.name == "adapter" and (place.parent / "stage.json").exists():
        place = place.parent
    stages = sorted(place.glob("stage_*/stage.json")) or [place / "stage.json"]
    if stages[-1].exists():
        stage = json.loads(stages[-1].read_text())
        return [*map(Path, stage["init_from"]), stages[-1].parent / "adapter"]
    if (place / "adapter_config.json").exists():
        return [place]
    raise Fault(f"init_from: {place} holds neither stage_*/stage.json nor adapter_config.json; name a run folder of a "
                "finished stage or an adapter folder")


# --- evaluation and reports ------------------------------------------------------------------------------------------


def judge(cfg: DictConfig) -> Any:
    """The configured judge, or None where there is none."""
    return instantiate(cfg.judge) if cfg.get("judge") else None


def _selection(cfg: DictConfig) -> dict[str, dict[str, Any]]:
    return OmegaConf.to_container(cfg.benchmarks, resolve=True) or {}


def _check_benchmarks(cfg: DictConfig, checked: Checked) -> None:
    for name, lack in suite.check(_selection(cfg), judge(cfg)).items():
        log.warning("%s will be left out: %s (%s)", name, lack["missing"], lack["cure"])


def sample_questions(triples: Sequence[Triple], count: int) -> list[Question]:
    """The first records with long answers, to be captioned before and after training."""
    longest = sorted(range(len(triples)), key=lambda i: (len(triples[i].preferred[1].text) < 40, i))[:count]
    return [Question(triples[i].id, triples[i].image, triples[i].question, {"record": i}) for i in longest]


def _caption(answers: Answers, samples: Sequence[Question]) -> list[str]:
    texts = dict(answers(samples, Decoding(max_new_tokens=96))) if samples else {}
    return [texts[i] for i in range(len(samples))]


def _report(cfg: DictConfig, checked: Checked, folder: Path, results: dict[str, Any], triples: Sequence[Triple],
            before: Sequence[str], after: Sequence[str]) -> None:
    """The dashboard's run of the evaluation: benchmark figures and the table of captions."""
    from povid.benchmarks.chair_words import objects, read_synonyms
    from povid.preferences.template import open_picture
    from povid.report import dashboards

    samples = sample_questions(triples, cfg.samples)
    records = []
    for sample, was, now in zip(samples, before, after):
        triple, number = triples[sample.meta["record"]], sample.meta["record"]
        picture = open_picture(triple.image)
        records.append({
            "id": triple.id, "image": picture, "question": triple.question, "before": was, "after": now,
            "noised": checked.noise.distort_picture(picture, seed=cfg.seed, epoch=0, record=number),
            "preferred": triple.preferred[-1].text, "dispreferred": triple.dispreferred[-1].text,
            "objects": triple.meta.get("objects"),
        })
    synonyms = Path(checked.data.benchmarks or "") / "synonyms.txt"
    known = read_synonyms(synonyms) if synonyms.is_file() else None
    find = (lambda text: objects(text, known)) if known else None
    table = dashboards.table_rows(records, find)
    if records:
        dashboards.write_page(table, folder / "captions.html")
    for logger in _loggers(cfg, checked, folder, "evaluate"):
        if isinstance(logger, WandbLogger):
            figures = {f"{name}/{key}": value for name, scores in results["benchmarks"].items()
                       for key, value in scores.items() if isinstance(value, (int, float))}
            logger.experiment.summary.update(figures)
            if records:
                dashboards.log_table(logger.experiment, table)
            _close([logger])


def _loggers(cfg: DictConfig, checked: Checked, folder: Path, job: str) -> list[Logger]:
    """metrics.csv always (but for an evaluation, which has no steps); W&B where it is wanted."""
    loggers: list[Logger] = [] if job == "evaluate" else [CSVLogger(str(folder), name=job, version="",
                                                                    flush_logs_every_n_steps=1)]
    if cfg.logger.wandb:
        multirun = folder.parent.name if (folder.parent / "multirun.yaml").exists() else folder.name
        loggers.append(WandbLogger(
            project=cfg.logger.project, entity=cfg.logger.entity, name=f"{folder.name}-{job}", group=multirun,
            job_type=job, save_dir=str(folder), mode=wandb_mode(cfg.logger.mode),
            tags=[cfg.row, checked.objective.name, checked.model.name, checked.data.name],
            config=OmegaConf.to_container(cfg, resolve=True),
        ))
    return loggers


def wandb_mode(mode: str) -> str:
    """``auto`` is online for who has logged in (key in the environment or in netrc), offline for everybody else."""
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    if mode != "auto":
        return mode
    import wandb

    return "online" if wandb.api.api_key else "offline"


def _close(loggers: Sequence[Logger]) -> None:
    """End W&B runs here: under a sweep the next job would otherwise go on in the same one."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            import wandb

            logger.finalize("success")
            wandb.finish()


# --- files -----------------------------------------------------------------------------------------------------------


def _claim(folder: Path, *, resume: bool) -> None:
    taken = [name for name in ("results.json", "stage_1", "stage_2", "benchmarks") if (folder / name).exists()]
    if taken and not resume:
        raise Fault(f"{folder} holds a run already ({', '.join(taken)}); choose another hydra.run.dir, or go on with "
                    "it by resume=true")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / ".writable", "")
        (folder / ".writable").unlink()
    except OSError as error:
        raise Fault(f"{folder} cannot be written ({error.strerror}); free space or choose another "
                    "hydra.run.dir") from None


def _write(file: Path, text: str) -> None:
    """All or nothing."""
    draft = file.with_name(f".{file.name}.part")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, file)


@contextmanager
def _saved(folder: Path) -> Iterator[Path]:
    """A folder that is there whole or not at all."""
    draft = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(draft, ignore_errors=True)
    yield draft
    os.replace(draft, folder)


@contextmanager
def _timed(timings: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    timings[name] = time.perf_counter() - start


def _choice(group: str) -> str | None:
    from hydra.core.hydra_config import HydraConfig

    return HydraConfig.get().runtime.choices.get(group) if HydraConfig.initialized() else None
