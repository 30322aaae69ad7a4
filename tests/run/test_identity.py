"""What was computed under other circumstances is refused by name, and under the same ones it is used again.

Runs are forks of the test's process, below ``outputs``, where a run looks for the stages of others.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny
from forks import at_step, finish, outcome, settings, train
from PIL import Image

from povid.fault import Fault
from povid.model.adapters import adapter_chain, adapter_digest
from povid.model.served import ServedModel
from povid.report.runs import find_runs, group
from povid.run import resume
from povid.run.checkpoint import checkpoints
from povid.run.identity import FREE, Identity, differences, is_free
from povid.run.stage import finished_stages


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("identity")
    tiny.save_tiny_llava(folder / "tiny")
    return folder


def quick(world: Path, *more: str) -> list[str]:
    """One epoch of five steps a stage."""
    return settings(world, "stages.1.epochs=1", "stages.2.epochs=1", "benchmarks=[]", *more)


def preferences(world: Path) -> Path:
    (file,) = (world / "out" / "scenes").glob("*/preferences.json")
    return file


@contextmanager
def changed(file: Path, change: Callable[[Path], object]) -> Iterator[None]:
    """A file that is changed, or removed, and put back."""
    content = file.read_bytes()
    change(file)
    yield
    file.write_bytes(content)


def swapped(file: Path) -> None:
    """Every preferred response changes places with the dispreferred one."""
    records = json.loads(file.read_text())
    for record in records:
        one, other = "conversations", "rejected_conversations"
        record[one], record[other] = record[other], record[one]
    file.write_text(json.dumps(records))


def one_less(file: Path) -> None:
    file.write_text(json.dumps(json.loads(file.read_text())[:-1]))


def repainted(file: Path) -> None:
    Image.new("RGB", Image.open(file).size, "white").save(file)


def louder(file: Path) -> None:
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"lora_alpha": 4 * config["lora_alpha"]}))


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def refused(command: list[str], folder: Path, *parts: str) -> None:
    log = folder.with_suffix(".log")
    log.unlink(missing_ok=True)
    assert finish(command, folder) == 2, log.read_text()
    for part in parts:
        assert part in log.read_text(), f"{part!r} is missing in {log.read_text()}"


def test_stage_2_starts_from_the_very_stage_1_that_it_would_have_trained(world):
    runs = world / "out" / "runs"
    runs.mkdir(parents=True)
    assert finish(quick(world, "stage=1"), runs / "one") == 0, (runs / "one.log").read_text()
    two, command = runs / "two", quick(world, "stage=2")
    with changed(preferences(world), swapped):
        refused(command, two, "holds no finished stage 1 that fits", str(runs / "one"), "records was '")
    refused([*command, "trainer.precision=bf16-true"], two, "trainer.precision was '32-true' and is now 'bf16-true'")
    refused([*command, "model.lora.r=4"], two, "model.lora.r was 16 and is now 4")
    refused([*command, "seed=3"], two, "seed was 0 and is now 3")
    foreign = runs / "one" / "stage_1" / "adapter"
    refused(
        [*command, f"adapters=[{foreign}]"],
        two,
        f"stages.1.starts_from was [] and is now ['{adapter_digest(foreign)}']",
    )
    with changed(foreign / "adapter_config.json", louder):
        refused(command, two, f"{foreign} was changed after")
    assert finish(command, two) == 0, two.with_suffix(".log").read_text()
    again = [*command, "resume=true", "samples=1"]  # samples are free
    (two / "results.json").unlink()
    with changed(two / "stage_2" / "adapter" / "adapter_model.safetensors", flipped):
        refused(again, two, f"{two}/stage_2/adapter was changed after")
    assert finish(again, two) == 0


def test_a_run_is_resumed_with_what_it_began_with(world):
    """Stopped in stage 1 with a checkpoint; then everything that it reads changes, one after the other."""
    folder, command = world / "resumed", quick(world, "resume=true", "seed=5")
    assert finish(command, folder, at_step(1, 3, signal.SIGTERM)) == 143
    with changed(preferences(world), one_less):
        refused(command, folder, "the checkpoint", "pictures was", "records was")
    with changed(preferences(world), swapped):
        refused(command, folder, "the checkpoint", "records was")
    first = json.loads(preferences(world).read_text())[0]["image"]
    picture = preferences(world).parent / first
    with changed(picture, repainted):
        refused(command, folder, "the checkpoint", "pictures was")
    with changed(world / "tiny" / "model.safetensors", flipped):
        refused(command, folder, "the checkpoint", "weights was")
    with changed(folder / "config.yaml", Path.unlink):
        refused(command, folder, "config.yaml is missing, so the settings that this run was started with are unknown")

    other = world / "other_seed"
    assert finish(quick(world, "seed=6"), other, at_step(1, 3, signal.SIGTERM)) == 143
    own, foreign = (checkpoints(place / "stage_1" / "checkpoints") for place in (folder, other))
    shutil.copytree(folder, world / "kept")
    for file in own:
        file.unlink()
    shutil.copy(foreign[0], own[0].parent)
    refused(
        command, folder, f"{own[0].parent / foreign[0].name} was made with something else (seed was 6 and is now 5)"
    )
    assert finish(command, world / "kept") == 0, (world / "kept.log").read_text()


def test_a_stage_is_computed_once_and_a_run_can_be_moved(world):
    """Both of a sweep's jobs have the same stage 1; what `both` makes of it is what it makes of its own."""
    both = quick(world, "seed=8", "samples=1")
    assert finish([*both, "ablation=both", f"outputs={world}/alone"], world / "alone_run") == 0
    sweep = world / "out" / "sweeps" / "s"
    status, printed = train("-m", *both, "ablation=text,both", f"hydra.sweep.dir={sweep}", log=world / "sweep.log")
    assert status == 0, printed
    text, reused = sweep / "0_text_seed8", sweep / "1_both_seed8"
    assert f"stage 1 was computed already and is copied from {text / 'stage_1'}" in printed
    assert outcome(reused) == outcome(world / "alone_run")
    assert (reused / "captions_before.json").read_bytes() == (text / "captions_before.json").read_bytes()
    results = json.loads((reused / "results.json").read_text())
    assert results["stages"]["1"]["computed_in"] == str(text) and results["stages"]["1"]["ablation"] == "both"

    digests = [adapter_digest(adapter) for adapter in adapter_chain(reused)]
    shutil.rmtree(text)
    moved = reused.rename(world / "moved")
    assert [*map(adapter_digest, adapter_chain(moved))] == digests
    assert adapter_chain(moved) == [moved / "stage_1" / "adapter", moved / "stage_2" / "adapter"]
    assert adapter_chain(moved / "stage_1") == [moved / "stage_1" / "adapter"]
    with changed(moved / "stage_1" / "adapter" / "adapter_model.safetensors", flipped), pytest.raises(Fault) as fault:
        adapter_chain(moved)
    assert "stage_1/adapter was changed after" in str(fault.value)


def test_the_report_averages_what_differs_in_the_seed_alone(world):
    short = settings(
        world, f"outputs={world}/rows", "stages.1.max_steps=1", "stages.2.max_steps=1", "data.prepare.evaluation=3"
    )
    for number, more in enumerate(
        (
            ["seed=0"],
            ["seed=1"],
            ["seed=1", "model.lora.r=4"],
            ["seed=1", "data.prepare.partner=0.9"],
            ["seed=1", "data.split=tuning"],
            ["seed=1", "benchmarks.pope.suffix=Yes or no?"],
        )
    ):
        folder = world / "rows" / "runs" / str(number)
        folder.parent.mkdir(parents=True, exist_ok=True)
        assert finish([*short, *more], folder) == 0, folder.with_suffix(".log").read_text()
    rows = group(find_runs(world / "rows"))
    assert sorted([run.folder.name for run in row.runs] for row in rows) == [["0", "1"], ["2"], ["3"], ["4"], ["5"]]
    labels = " ".join(f"{row.label} {row.remarks}" for row in rows)
    for part in (
        "model.lora.r=4",
        "data.prepare.partner=0.9",
        "data.split=tuning",
        "benchmarks.pope.suffix=Yes or no?",
    ):
        assert part in labels, labels
    results = json.loads((world / "rows" / "runs" / "0" / "results.json").read_text())
    parts = results["identity"]["parts"]
    assert parts["seed"] == 0 and parts["trainer.precision"] == "32-true" and parts["records"] and parts["weights"]
    assert parts["stages.2.starts_from"] == [adapter_digest(world / "rows" / "runs" / "0" / "stage_1" / "adapter")]


def test_what_another_user_computed_is_not_used_unasked(tmp_path, monkeypatch, caplog):
    home = tmp_path / "run" / "stage_1"
    (home / "adapter").mkdir(parents=True)
    (home / "adapter" / "adapter_model.safetensors").write_bytes(b"w")
    (home / "stage.json").write_text(json.dumps({"finished": "2026", "identity": {"digest": "d"}}))
    assert finished_stages(tmp_path, 1, "d") == finished_stages(tmp_path, 1) == [home]
    monkeypatch.setattr(resume.os, "getuid", lambda: home.stat().st_uid + 1)
    assert finished_stages(tmp_path, 1, "d") == []
    assert f"{home} belongs to another user and is not used; to use it, name it with init_from=" in caplog.text
    caplog.clear()
    assert finished_stages(tmp_path, 1, "other") == [] and not caplog.text


def test_how_a_server_is_asked_changes_no_number_and_where_it_is_may(tmp_path):
    free = [name for name in ServedModel.model_fields if is_free(f"model.{name}")]
    assert sorted(set(ServedModel.model_fields) - {*free}) == [
        "base_url",
        "extra",
        "max_side",
        "max_tokens_key",
        "model",
        "name",
        "revision",
        "system",
    ]


def test_an_identity_names_what_differs():
    one = Identity({"seed": 0, "model.lora.r": 16, "records": "a"}, {})
    assert differences(one.parts, dict(one.parts)) == []
    assert differences(one.parts, {"seed": 1, "records": "a", "x": None}) == [
        "model.lora.r was 16 and is now None",
        "seed was 0 and is now 1",
        "x was None and is now None",
    ]
    assert len(differences({}, dict.fromkeys(map(str, range(20)), 1))) == 9
    one.check(one.record(), "it", "cure")
    for recorded in (None, {}, {"parts": 3}):
        with pytest.raises(Fault, match="it was written by an earlier version, .*; move it away"):
            one.check(recorded, "it", "cure")
    assert all(map(is_free, FREE)) and is_free("logger.wandb.project")
    assert not is_free("model.lora.r") and not is_free("loggers") and not is_free("data.limit")


def test_an_adapters_digest_is_its_content(tmp_path):
    """Layers in another order and a base model in another place make the same adapter; alpha and a bit do not."""

    def adapter(name: str, weights: bytes = b"w", **config: object) -> str:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_bytes(weights)
        values = {"r": 4, "lora_alpha": 8, "target_modules": ["a", "b"], "base_model_name_or_path": "x", **config}
        (folder / "adapter_config.json").write_text(json.dumps(values))
        return adapter_digest(folder)

    plain = adapter("plain")
    assert plain == adapter("same", target_modules=["b", "a"], base_model_name_or_path="y")
    others = [
        adapter("alpha", lora_alpha=32),
        adapter("r", r=8),
        adapter("bit", b"v"),
        adapter("m", target_modules=["a"]),
    ]
    assert len({plain, *others}) == 5
    assert hashlib.sha256(b"w").hexdigest()[:16] not in (plain, *others)
