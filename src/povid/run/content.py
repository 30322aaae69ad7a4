"""The identities of stages, answers and runs, from their settings and the content of what they read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from povid import files
from povid.fault import Fault
from povid.method.objectives import ON_DISTORTED
from povid.model.adapters import adapter_digest
from povid.model.loading import loading
from povid.preferences.pictures import PICTURE_BYTES, picture_digests
from povid.preferences.records import sources
from povid.preferences.stored import file_digest
from povid.preferences.triple import Triple
from povid.run.identity import Identity, digest, flat, identity, is_free
from povid.run.processes import device
from povid.run.settings import Settings, is_watcher

LIBRARIES = ("povid", "torch", "lightning", "transformers", "peft", "diffusers", "numpy", "pillow")
VALIDATES = ("val_check_interval", "check_val_every_n_epoch", "limit_val_batches")  # of the trainer: when and on what


class Content:
    """The digests of what a run reads, each computed once and when it is first needed."""

    def __init__(self, settings: Settings, triples: Sequence[Triple], held_out: Sequence[Triple] = ()) -> None:
        self.settings, self.triples, self.held_out = settings, triples, held_out

    @cached_property
    def records(self) -> str:
        """The records to train on as they are used, in their order."""
        return _records(self.triples)

    @cached_property
    def watched(self) -> str | None:
        """What measures a stage while it trains: the held-out records, when they are asked, and the callbacks that only
        measure, with the content of their files. None if nothing does.

        It changes no weight, so it is part of no identity unless it chooses the best adapter.
        """
        settings, found = self.settings, []
        if self.held_out:
            when = {k: settings.trainer.get(k) for k in VALIDATES}
            found = [_records(self.held_out), _pictures(self.held_out), when]
        nodes = {name: node for name, node in settings.callbacks.items() if is_watcher(node)}
        files_of = [watcher.content() for watcher in settings.watchers()]
        return digest([found, nodes, files_of]) if found or nodes else None

    @cached_property
    def records_as_read(self) -> str:
        """The same for every seed: of records whose dispreferences a seed decides, the files that they come from."""
        if self.settings.dispreference_name == "given":
            return self.records
        data = self.settings.data
        found = [each for place in (data.preferences, data.objects, data.synonyms) if place for each in sources(place)]
        with ThreadPoolExecutor(8) as threads:
            return digest(list(threads.map(file_digest, found)))

    @cached_property
    def pictures(self) -> str:
        return _pictures(self.triples)

    @cached_property
    def weights(self) -> str | None:
        """The base model's files; of a model from the hub, its commit; None for a served model.

        The bytes of a local folder are read. A commit of the hub is a hash over its files' hashes, so it stands for
        their bytes; whether the copy in the hub's cache was changed on this machine is not looked at.
        """
        source = getattr(self.settings.model, "source", None)
        return None if source is None else weights_digest(source)


def weights_digest(source: str) -> str:
    """What names the files of a model's folder or, of a model from the hub, its commit.

    Raises:
        Fault: it is not in the hub's cache and cannot be downloaded.
    """
    folder = Path(source)
    if not folder.is_dir():
        from transformers.utils import cached_file

        with loading(source):
            file = cached_file(source, "config.json")
        if file is None:
            raise Fault(f"{source} has no config.json on the hub; set model.path to a model that transformers can load")
        return Path(file).parent.name
    found = [
        file
        for file in files.files_in(folder)
        if file.suffix != ".md" and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    with ThreadPoolExecutor(8) as threads:
        digests = threads.map(files.digest, found)
        return digest([[str(file.relative_to(folder)), each] for file, each in zip(found, digests)])


def _records(triples: Sequence[Triple]) -> str:
    found = hashlib.sha256()
    for triple in triples:
        turns = [[turn.role, turn.text] for side in (triple.preferred, triple.dispreferred) for turn in side]
        found.update(json.dumps([triple.id, turns]).encode())
    return found.hexdigest()[:16]


def _pictures(triples: Sequence[Triple]) -> str:
    shown = [picture for triple in triples for picture in triple.pictures]
    found = dict(zip(shown, picture_digests(shown, lambda file: files.digest(file, PICTURE_BYTES))))
    own = [[found[picture] for picture in triple.pictures] for triple in triples]
    return digest([each[0] if len(each) == 1 else each for each in own])


def of_stage(settings: Settings, number: int, adapters: Sequence[Path], content: Content) -> Identity:
    """The identity of stage ``number`` on top of ``adapters``.

    Raises:
        Fault: an adapter cannot be read.
    """
    stage, tree = settings.stages[number], settings.tree
    terms = settings.terms[number]
    chosen = {
        "model": tree["model"],
        "data": {"group_by_length": settings.data.group_by_length},
        "objective": {str(number): settings.objective_node(number)},
        "stages": {str(number): stage.model_dump(exclude={"name"}) | {"terms": sorted(terms)}},
        "dispreference": tree["dispreference"] if settings.dispreference_name != "given" else {},
        "noise": tree["noise"] if terms & ON_DISTORTED else {},
        "optimizer": settings.optimizer,
        "schedule": settings.schedule,
        "callbacks": {name: node for name, node in settings.callbacks.items() if not is_watcher(node)},
        "trainer": settings.trainer,
    }
    parts = {key: value for key, value in flat(chosen) if not is_free(key) and key != "model.name"}
    parts |= computing(content.weights)
    cached = settings.plain.reference_cache
    parts |= {"pictures": content.pictures, "reference_cache": stage.epochs > 1 if cached is None else cached}
    if isinstance(settings.data.validation, float):
        parts["data.validation"] = settings.data.validation
    if settings.checkpoint.best is not None:
        choice = settings.checkpoint.model_dump(include={"best", "guard", "max_fall"})
        parts |= {f"checkpoint.{key}": value for key, value in choice.items()} | {"watched": content.watched}
    below = [adapter_digest(adapter) for adapter in adapters]
    rows = [recorded_row(adapter) or found for adapter, found in zip(adapters, below)]
    under = f"stages.{number}.starts_from"
    return identity(
        parts | {"seed": settings.plain.seed, "records": content.records, under: below},
        parts | {"records": content.records_as_read, under: rows},
    )


def of_answers(settings: Settings, adapters: Sequence[Path], content: Content) -> Identity:
    """The identity of who answers the benchmarks: the model with its adapters, and the engine if it is not the model's.

    Where it computes in fewer than 32 bits its answers depend on how many questions are answered together, not on how
    many processes share them (``povid.model.generation.Answers``).
    """
    engine = settings.engine
    chosen = {"model": settings.tree["model"]}
    if engine is not None:
        chosen["generation"] = {"engine": settings.tree["generation"]["engine"]}
    parts = {key: value for key, value in flat(chosen) if not is_free(key)}
    parts |= computing(content.weights) | {
        f"versions.{name}": _version(name) for name in getattr(engine, "libraries", ())
    }
    if getattr(engine or settings.model, "answers_depend_on_batch", True):
        parts["generation.batch_size"] = settings.generation.batch_size
    below = [adapter_digest(adapter) for adapter in adapters]
    rows = [recorded_row(adapter) or found for adapter, found in zip(adapters, below)]
    return identity(parts | {"seed": settings.plain.seed, "adapters": below}, parts | {"adapters": rows})


def of_run(answers: Identity, stages: Sequence[Mapping[str, Any]], settings: Settings, folder: Path) -> Identity:
    """The identity of a run's scores: who answers, the stages (what their stage.json records), and what was asked.

    ``folder`` holds the benchmarks' folders, in whose asked.json the suite has recorded the questions.
    """
    asked: dict[str, Any] = {}
    for name in settings.benchmarks:
        note = folder / name / "asked.json"
        if note.exists():
            found = json.loads(note.read_text(encoding="utf-8"))
            node = settings.tree["benchmarks"][name]
            asked |= {f"benchmarks.{name}.{k}": v for k, v in flat(node) if k not in ("data", "images", "limit")}
            asked |= {f"benchmarks.{name}.{k}": found[k] for k in ("texts", "pictures", "truth", "limit") if k in found}
    parts: dict[str, Any] = {}
    row: dict[str, Any] = {}
    for stage in stages:
        parts |= stage["identity"]["parts"]
        row |= stage["identity"]["row"]
    return identity(parts | {**answers.parts} | asked, row | {**answers.row} | asked)


def names(settings: Settings) -> dict[str, Any]:
    """Settings that say in words where content comes from, for labels: its digests say only that it differs."""
    data = {key: value for key, value in settings.tree["data"].items() if key != "source"}
    found = dict(flat({"data": data, "model": {"path": settings.tree["model"].get("path")}}))
    settled = {key: value for key, value in found.items() if not is_free(key)}
    return {"settings": settled, "places": {key: value for key, value in found.items() if key not in settled}}


def recorded_row(adapter: Path) -> str | None:
    """The identity, without seed, of the stage that made an adapter; None for one from elsewhere."""
    try:
        return json.loads((adapter.parent / "stage.json").read_text(encoding="utf-8"))["identity"]["unseeded"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def computing(weights: str | None) -> dict[str, Any]:
    """The parts of every identity: the frozen weights, what computes, and on what."""
    parts = {"device": device().type} | {f"versions.{name}": _version(name) for name in LIBRARIES}
    return parts if weights is None else parts | {"weights": weights}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
