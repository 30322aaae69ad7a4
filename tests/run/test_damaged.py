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
from povid.run.samples import noise_responses
from povid.run.watch import Rows

NOTES = ("results.json", "stage.json")  # an empty mapping is damage too


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
        for content in (b"", b"[1", b"3", b"\xff\xfe\x00\n", *([b"{}"] if name.endswith(NOTES) else [])):
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
    file = folder / "stage_1" / "metrics.csv"
    head, first, *others = file.read_text().splitlines()
    cut, long = ["\n".join([head, line, *others]) + "\n" for line in (first[:9], f"{first},7")]
    for content in (b"epoch,step\n0,\xff\n", cut.encode(), long.encode()):
        file.write_bytes(content)
        log.unlink()
        assert finish(settings(world, "ablation=text", "resume=true"), folder) == 2
        assert f"error: {folder}/stage_1/metrics.csv is damaged" in log.read_text()
        assert file.read_bytes() == content


@pytest.mark.parametrize("line", ["0,2", "0,2,0.5,0.5", "0,2,half"])
def test_damaged_rows_of_a_validation_are_named(tmp_path, line):
    file = tmp_path / "validation.csv"
    Rows(file).add(1, 0, {"val/loss": 0.6})
    file.write_text(f"{file.read_text()}{line}\n")
    with pytest.raises(Fault, match="validation.csv is damaged"):
        Rows(file, start=2).add(3, 0, {"val/loss": 0.4})


def test_damaged_responses_are_named(tmp_path):
    (tmp_path / "stage_2").mkdir()
    file = tmp_path / "stage_2" / "noise_responses.json"
    file.write_text('{"a": [["A dog", true]]}')
    assert noise_responses(tmp_path) == {"a": [("A dog", True)]}
    for content in ('{"a": [3]}', '{"a": [["A dog"]]}', '{"a": 3}'):
        file.write_text(content)
        with pytest.raises(Fault, match="noise_responses.json is damaged"):
            noise_responses(tmp_path)


def test_a_finished_run_is_asked_nothing_new_unseen(world, tmp_path):
    """What is the same question is answered from the folder; where the files lie makes no difference."""
    command = settings(world, "ablation=none", "resume=true")
    folder, log = tmp_path / "run", tmp_path / "run.log"
    assert finish(command, folder) == 0, log.read_text()
    before = (folder / "results.json").read_bytes()
    assert finish([*command, "benchmarks.pope.images=/elsewhere"], folder) == 0, log.read_text()
    for more, said in (
        ("benchmarks=[pope,chair]", "is finished and has no answers to chair; move its results.json away and resume"),
        (
            "benchmarks.pope.max_new_tokens=3",
            "is finished, and benchmarks.pope.max_new_tokens was 128 there and is now 3",
        ),
    ):
        assert finish([*command, more], folder) == 2
        assert said in log.read_text()
    assert (folder / "results.json").read_bytes() == before


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
