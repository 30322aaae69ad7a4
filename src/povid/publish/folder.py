"""What is published of a run: its adapters as one LoRA, or a merged checkpoint, with a model card."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from povid.fault import Fault, holds_login
from povid.files import read_json, write_json, write_text
from povid.model.adapters import adapter_chain, adapter_digest, merge, new_place
from povid.model.combine import combine
from povid.model.loading import PACKAGE, Dtype
from povid.publish.card import Base, License, card, license_of
from povid.report.runs import Run, read

COMMIT = 40  # hexadecimal digits in the identity of a model from the hub; a folder's content has sixteen
TEXTS = (".json", ".md", ".txt", ".jinja")
TOKEN = re.compile(r"\b(hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{20,})")


@dataclass(frozen=True)
class Publishable:
    """A finished run whose adapters are those that its scores were measured with.

    ``source`` is what its base model is loaded from on this machine, ``base`` what the base model is called elsewhere.
    """

    folder: Path
    run: Run
    adapters: tuple[Path, ...]
    source: str
    base: Base
    license: License


def publishable(folder: Path, *, base: str | None = None, license: str | None = None) -> Publishable:
    """Check that a run can be published.

    Args:
        folder: of the run.
        base: the base model's name on the hub, for a run that loaded it from a folder.
        license: the base model's license; None for what its model card says.

    Raises:
        Fault: the run is not finished, trained nothing, its adapters are damaged or not those of its results, or the
            base model's name or license is not known.
    """
    run = _read(folder)
    identity = run.results.get("identity")
    parts, named = (identity.get(key) if isinstance(identity, dict) else None for key in ("parts", "named"))
    if not isinstance(parts, dict) or not isinstance(named, dict):
        raise Fault(
            f"{folder} is of an earlier version, which did not record what it ran on; run it again to publish it"
        )
    if not run.results.get("stages"):
        raise Fault(
            f"{folder} trained nothing (ablation={run.results.get('ablation')}), so there is nothing to publish"
        )
    chain = tuple(adapter_chain(folder))
    if [adapter_digest(adapter) for adapter in chain] != parts.get("adapters"):
        raise Fault(
            f"the scores in {folder / 'results.json'} were measured with other adapters than {folder} builds on; move "
            "results.json away and resume the run to measure them again"
        )
    source = str(named["places"].get("model.path"))
    found = _base(folder, source, str(parts.get("weights")), base)
    return Publishable(folder, run, chain, source, found, license_of(found, license))


def _read(folder: Path) -> Run:
    if (folder / "results.json").is_file():
        try:
            return read(folder / "results.json")
        except (OSError, ValueError) as error:
            raise Fault(f"{folder / 'results.json'} cannot be used: {error}") from None
    if (folder / "config.yaml").exists():
        raise Fault(
            f"{folder} is not finished: it has no results.json; resume it with python train.py resume=true "
            f"hydra.run.dir={folder}"
        )
    raise Fault(f"{folder} is not the folder of a run: it has no results.json; name one below outputs/")


def _base(folder: Path, source: str, weights: str, wanted: str | None) -> Base:
    if source.startswith("package:"):
        return Base(None, package=source.removeprefix("package:"))
    if len(weights) == COMMIT:
        return Base(wanted or source, commit=weights if wanted in (None, source) else None)
    if wanted is None:
        raise Fault(
            f"{folder} loaded its base model from the folder {source}, which nobody else has; name the same model on "
            "the hub with --base OWNER/NAME"
        )
    return Base(wanted)


def write(found: Publishable, out: Path, *, repo: str, dtype: Dtype | None = None) -> None:
    """Write the folder that is published.

    Args:
        out: a new folder.
        repo: what the card calls the model: OWNER/NAME.
        dtype: of the weights of a merged checkpoint; None for an adapter.

    Raises:
        Fault: ``out`` exists or cannot be written, the adapters cannot be combined (``combine``), or a file would tell
            something about this machine.
    """
    with new_place(out) as place:
        if dtype is not None:
            merge(found.adapters, place, base=found.source, dtype=dtype)
            config = None
        else:
            _write_adapter(found, place)
            config = read_json(place / "adapter_config.json", dict, "write it again")
        text = card(found.run, found.base, found.license, repo=repo, adapter=config, dtype=dtype)
        write_text(place / "README.md", text)
        keep_private(place, found.folder)


def _write_adapter(found: Publishable, place: Path) -> None:
    """One LoRA in peft's format that names the base model as others know it."""
    if len(found.adapters) > 1:
        combine(found.adapters, place, base=found.source)
    else:
        place.mkdir()
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copyfile(found.adapters[0] / name, place / name)
    note = place / "adapter_config.json"
    write_json(note, read_json(note, dict, "write it again") | {"base_model_name_or_path": found.base.name})


def keep_private(place: Path, run: Path) -> None:
    """Raise a Fault if a text to be published names a folder of this machine, or holds a key or password."""
    folders = {str(folder) for folder in (Path.home(), Path.cwd(), run.resolve(), PACKAGE) if len(folder.parts) > 1}
    for file in sorted(place.rglob("*")):
        if file.suffix not in TEXTS:
            continue
        text = file.read_text(encoding="utf-8", errors="replace")
        for what in _private(text, folders, file.suffix == ".md"):
            raise Fault(
                f"{file.name} would contain {what}, which must not leave this machine; publish a run whose names and "
                "settings do not contain it"
            )


def _private(text: str, folders: set[str], prose: bool) -> Iterator[str]:
    for folder in sorted(folders, key=len, reverse=True):
        if re.search(rf"(?<![\w.]){re.escape(folder)}(?![\w.-])", text):
            yield f"the path {folder}{os.sep}..."
    if TOKEN.search(text):
        yield "what looks like an access token"
    if prose and holds_login(text):
        yield "an address with a user name or password"
