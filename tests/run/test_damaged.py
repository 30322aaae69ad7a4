"""Damaged files of a run: one sentence with the file and how to go on, nothing deleted, nothing trained unasked."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
import tiny
from forks import at_step, finish, settings

from povid.fault import Fault
from povid.run.resume import expand


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("damaged")
    tiny.save_tiny_llava(folder / "tiny")
    return folder


def test_every_damaged_file_of_a_run_is_named(world, tmp_path):
    command = settings(world, "ablation=text", "stages.1.max_steps=4", "samples=1", "resume=true")
    whole = tmp_path / "whole"
    assert finish(command, whole) == 0, whole.with_suffix(".log").read_text()
    cases = {
        "results.json": "move it away and resume",
        "stage_1/stage.json": "move {home} away to train the stage again",
        "stage_1/adapter/adapter_config.json": "move {home} away to train the stage again",
        "stage_1/adapter/adapter_model.safetensors": "put back the adapter that the stage saved",
        "captions_before.json": "move it away to leave out",
        "benchmarks/pope/asked.json": "away and run again",
        "benchmarks/pope/answers.jsonl": "remove that line",
    }
    for number, (name, cure) in enumerate(cases.items()):
        for content in (b"", b"[1", b"3", b"\xff\xfe\x00\n"):
            if name.endswith("answers.jsonl") and not content.endswith(b"\n"):
                continue  # an empty file and a torn last line are what a kill leaves
            folder = tmp_path / f"case_{number}"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(whole, folder)
            if name != "results.json":
                (folder / "results.json").unlink()
            (folder / name).write_bytes(content)
            log = folder.with_suffix(".log")
            log.unlink(missing_ok=True)
            assert finish(command, folder) == 2, (name, content, log.read_text())
            said = log.read_text()[log.read_text().rindex("error: ") :]
            assert str((folder / name).parent) in said and cure.format(home=folder / "stage_1") in said, said
            assert (folder / name).read_bytes() == content
            assert (folder / "stage_1" / "adapter").is_dir()


def test_damaged_metrics_are_named(world, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "run.log"
    assert finish(settings(world, "ablation=text"), folder, at_step(1, 5, signal.SIGTERM)) == 143
    (folder / "stage_1" / "metrics.csv").write_bytes(b"epoch,step\n0,\xff\n")
    assert finish(settings(world, "ablation=text", "resume=true"), folder) == 2
    assert f"error: {folder}/stage_1/metrics.csv is damaged" in log.read_text()


def test_a_damaged_record_of_the_command_is_named(tmp_path):
    for content in (b"hydra: [", b"\xff", b"", b"{}"):
        (tmp_path / "run" / ".hydra").mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / "config.yaml").write_text("{}")
        (tmp_path / "run" / ".hydra" / "hydra.yaml").write_bytes(content)
        with pytest.raises(Fault, match=f"{tmp_path}/run/.hydra/hydra.yaml does not hold the command line"):
            expand(["resume=latest", f"outputs={tmp_path}"])
        (tmp_path / "run" / "command.yaml").write_bytes(content)
        with pytest.raises(Fault, match=f"{tmp_path}/run/command.yaml does not hold the command line"):
            expand(["resume=latest", f"outputs={tmp_path}"])
        (tmp_path / "run" / "command.yaml").unlink()
