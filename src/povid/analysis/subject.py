"""Whom an analysis looks into: a model with adapters, from a run folder or from a command line.

Of a run folder nothing is built that names code. Its model is rebuilt from the keys that a ``LocalModel`` has, and it
must consist of the adapters and weights that the run's identity records.
"""

from __future__ import annotations

import argparse
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from PIL import Image

from povid.benchmarks.chair import CHAIR
from povid.fault import Fault, validated
from povid.machine import conf_folder
from povid.method.distortions import Distortion, distort_picture, generator
from povid.model.adapters import adapter_chain, adapter_digest
from povid.model.loading import LocalModel
from povid.model.packing import Packed
from povid.model.policy import Policy
from povid.model.question import Question
from povid.model.template import Template
from povid.preferences.pictures import open_picture
from povid.preferences.triple import pictures_of
from povid.report.runs import Run, find_runs
from povid.run import build
from povid.run.content import weights_digest
from povid.run.identity import digest
from povid.run.overrides import explain
from povid.run.processes import device

OVERRIDE = re.compile(r"[+~]{0,2}[A-Za-z_][\w.@/]*=.*", re.DOTALL)
OF_A_RUN = ("model", "adapters")  # keys that run folders decide
PICTURES = ("data", "images", "prompt", "number", "seed", "ids")  # settings of CHAIR that say what is asked


def add_places(parser: argparse.ArgumentParser, what: str = "model") -> None:
    """Add the arguments that say which runs, or which model, an analysis is about."""
    parser.add_argument(
        "places",
        nargs="*",
        metavar="FOLDER|KEY=VALUE",
        help=f"run folders, or folders of runs at any depth; without one, the {what} that KEY=VALUE choose as for "
        "train.py (model=..., adapters=[...], noise=...)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for what compares runs (default: analysis in the first FOLDER)"
    )


def split(places: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Folders and overrides of a command line."""
    overrides = [place for place in places if OVERRIDE.fullmatch(place) and not Path(place).exists()]
    return [Path(place) for place in places if place not in overrides], overrides


def out_folder(options: argparse.Namespace) -> Path:
    folders, _ = split(options.places)
    return options.out or (folders[0] / "analysis" if folders else Path("outputs/analysis"))


def compose(overrides: Sequence[str]) -> dict[str, Any]:
    """The configuration that train.py would compose of these overrides.

    Raises:
        Fault: there is no such key or file.
    """
    try:
        with initialize_config_dir(str(conf_folder()), version_base="1.3", job_name="analysis"):
            cfg = hydra_compose("config", list(overrides))
            tree: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException, ValueError, TypeError) as error:
        raise Fault(explain(error, overrides)) from None
    return tree


def node(tree: Mapping[str, Any], key: str) -> Any:
    """The node at a dotted key of a composed configuration, built.

    Raises:
        Fault: there is none, or it is invalid; one sentence with every problem.
    """
    found: Any = tree
    for part in key.split("."):
        found = (found or {}).get(part)
    if not build.is_node(found):
        raise Fault(f"{key}: found {found!r}, needed a _target_; choose a file of conf/{key.split('.')[0]}")
    problems: list[str] = []
    made = build.build(found, key, problems)
    if problems:
        raise Fault("; ".join(problems))
    return made


@dataclass(frozen=True)
class Subject:
    """A model with its adapters, as ``row`` and ``seed`` of a table, and the pictures to look at.

    ``run`` is the finished run that it comes from, None for one from the command line. ``pictures`` are CHAIR's,
    because they come with the objects that are in them; ``habits`` is a file of the objects of many pictures.
    """

    row: str
    seed: Any
    model: LocalModel
    adapters: tuple[Path, ...]
    run: Run | None = None
    pictures: CHAIR | None = None
    habits: Path | None = None

    @property
    def digest(self) -> str:
        """The digest of the run's identity or, without a run, of the model with its adapters and weights."""
        return self.run.results["identity"]["digest"] if self.run else digest(self.parts)

    @cached_property
    def parts(self) -> dict[str, Any]:
        """What its outputs depend on, apart from what it is asked."""
        settings = self.model.model_dump(mode="json", exclude={"name", "path", "prepare", "lora", "fused"})
        adapters = [adapter_digest(adapter) for adapter in self.adapters]
        return {"model": settings, "weights": _weights(self.model.source), "adapters": adapters}

    @property
    def folder(self) -> Path | None:
        """Where its own figures belong: ``analysis`` in its run folder."""
        return self.run.folder / "analysis" if self.run else None

    @property
    def before(self) -> Subject:
        """The same model without adapters."""
        return replace(self, row="none", adapters=(), run=None)

    def record(self) -> dict[str, Any]:
        """How a JSON names it."""
        return {"digest": self.digest, "row": self.row, "seed": self.seed, "device": device().type}

    def load(self, **changes: Any) -> tuple[Policy, Template]:
        """Its policy, ready to be evaluated on this machine's device, and how it is prompted."""
        policy = self.model.model_copy(update=changes).policy(self.adapters, adapted=False).to(device()).eval()
        return policy, self.model.template(policy.processor)

    def questions(self, limit: int | None = None) -> list[Question]:
        """CHAIR's questions about its pictures.

        Raises:
            Fault: no pictures are known, or their files are missing or damaged.
        """
        if self.pictures is None:
            raise Fault(
                f"{self.run.folder if self.run else 'the configuration'} names no pictures with known objects "
                "(benchmark chair); give benchmarks.chair.data=FOLDER"
            )
        return self.pictures.questions()[:limit]


def subjects(places: Sequence[str], *, pictures: bool = True) -> list[Subject]:
    """Every run below the folders of a command line or, without a folder, the model that it chooses.

    ``pictures``: the data's own are wanted, so the data are made where the configuration makes them.

    Raises:
        Fault: there is no run, a run folder is damaged, or an override is not for runs.
    """
    folders, overrides = split(places)
    if not folders:
        return [_chosen(compose(overrides), pictures)]
    for override in overrides:
        if re.split(r"[.@/=]", override.lstrip("+~"))[0] in OF_A_RUN:
            raise Fault(f"{override}: run folders say which model they hold; leave it out, or leave the folders out")
    runs = {run.file.resolve(): run for folder in folders for run in find_runs(folder)}
    found = [of_run(run) for run in runs.values()]
    keys = {override.lstrip("+~").partition("=")[0] for override in overrides}
    if any(key.split(".")[0] in ("benchmarks", "data") for key in keys):
        other = _chosen(compose(overrides), pictures)
        found = [replace(subject, pictures=other.pictures, habits=other.habits) for subject in found]
    return found


def _chosen(tree: Mapping[str, Any], pictures: bool) -> Subject:
    """The model that a composed configuration chooses; its data are made if ``pictures`` are wanted."""
    model = node(tree, "model")
    if not isinstance(model, LocalModel):
        raise Fault("model: only a model whose weights are loaded here can be looked into; choose another model=")
    for maker in (model.prepare, (tree.get("data") or {}).get("prepare") if pictures else None):
        if maker:
            build.make(maker)
    chair = node(tree, "benchmarks.chair") if (tree.get("benchmarks") or {}).get("chair") else None
    habits = (tree.get("data") or {}).get("objects")
    adapters = tuple(adapter for place in tree["adapters"] for adapter in adapter_chain(Path(place)))
    row = "none" if not adapters else "tuned"
    return Subject(row, None, model, adapters, None, chair, Path(habits) if habits else None)


def of_run(run: Run) -> Subject:
    """The model of a finished run: with the adapters and weights of its identity, or not at all.

    Raises:
        Fault: config.yaml is damaged or names code, or the folder does not hold what the run was evaluated with.
    """
    file = run.folder / "config.yaml"
    parts = (run.results.get("identity") or {}).get("parts") or {}
    if "adapters" not in parts or "weights" not in parts:
        raise Fault(f"{run.file} does not say which adapters and weights it was evaluated with; start that run again")
    tree = _read(file)
    there = tree.get("model")
    ours = f"{LocalModel.__module__}.{LocalModel.__qualname__}"
    if not isinstance(there, Mapping) or there.get("_target_") != ours:
        raise Fault(
            f"{file}: model is not a {ours}, and a class is not taken from a run folder; choose the model and its "
            "adapters with model= and adapters=[...] instead of the folder"
        )
    if build.is_node(there.get("architecture")):
        raise Fault(
            f"{file}: model.architecture names a class, which is not taken from a run folder; choose the model and its "
            "adapters with model= and adapters=[...] instead of the folder"
        )
    values = {key: there[key] for key in LocalModel.model_fields if key in there and key != "prepare"}
    model = validated(LocalModel, values, f"{file}: model")
    if any(run.folder.glob("stage_*/stage.json")):
        adapters = adapter_chain(run.folder)
    else:
        adapters = [Path(adapter) for adapter in run.results.get("adapters") or ()]
    subject = Subject(run.row, run.seed, model, tuple(adapters), run, _pictures(tree, file), _habits(tree))
    for name, cure in (("adapters", "put its adapters back"), ("weights", "put the model's files back")):
        if subject.parts[name] != parts[name]:
            raise Fault(f"{run.folder} was evaluated with other {name} than are there now; {cure}, or train it again")
    return subject


@functools.cache  # gigabytes of a large model are read once for all of its runs
def _weights(source: str) -> str:
    try:
        return weights_digest(source)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise Fault(f"the model's files cannot be read ({reason}); put {source} back, or go online") from None


def _read(file: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise Fault(f"{file} cannot be read ({type(error).__name__}); restore it from a copy") from None
    if not isinstance(tree, dict):
        raise Fault(f"{file} is damaged: it does not hold settings; restore it from a copy")
    return tree


def _pictures(tree: Mapping[str, Any], file: Path) -> CHAIR | None:
    asked = tree.get("benchmarks")
    chair = asked.get("chair") if isinstance(asked, Mapping) else None
    if not isinstance(chair, Mapping):
        return None
    return validated(CHAIR, {key: chair[key] for key in PICTURES if key in chair}, f"{file}: benchmarks.chair")


def _habits(tree: Mapping[str, Any]) -> Path | None:
    data = tree.get("data")
    objects = data.get("objects") if isinstance(data, Mapping) else None
    return Path(objects) if isinstance(objects, str) else None


def distorted(
    distortion: Distortion,
    template: Template,
    question: Question,
    images: Mapping[str, torch.Tensor],
    *,
    seed: int,
    record: int,
) -> dict[str, torch.Tensor]:
    """The tensors of x^n, as training makes them for this record in its first epoch."""
    shown = pictures_of(question.image)
    sources = [generator(seed=seed, epoch=0, record=record, picture=number) for number in range(len(shown))]
    if distortion.space == "pixel":
        pictures = [distort_picture(distortion, open_picture(one), source) for one, source in zip(shown, sources)]
        prompt = template.prompt(question.text, pictures=len(shown))
        return template.see(prompt, *map(template.picture, pictures))[1]
    return {**images, "pixel_values": distortion(images["pixel_values"], sources[0])}


def moved(packed: Packed, place: torch.device) -> Packed:
    """The packed sequences on a device."""
    tensors: dict[str, Any] = {key: value for key, value in packed._asdict().items() if isinstance(value, torch.Tensor)}
    return packed._replace(**{key: value.to(place) for key, value in tensors.items()})


def as_seen(template: Template, images: Mapping[str, torch.Tensor]) -> Image.Image | None:
    """The picture that a model sees, from its tensors; None if they are no picture, but patches.

    Of several tiles the first. Colours outside 8 bits are cut.
    """
    processor, pixels = template.processor.image_processor, images["pixel_values"].float()
    if pixels.ndim < 4 or pixels.shape[-3] != 3:
        return None
    pixels = pixels.reshape(-1, *pixels.shape[-3:])[0]
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    return Image.fromarray(((pixels * std + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())
