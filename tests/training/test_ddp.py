"""Two processes (gloo) learn what one process learns from the same global batches, and a sweep runs each job once."""

from __future__ import annotations

import csv
import signal
from pathlib import Path

import pytest
import tiny
import torch
from forks import at_step, finish, settings, train
from safetensors.torch import load_file

TWO = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ddp")
    tiny.save_tiny_llava(folder / "tiny")
    return folder


def losses(home: Path) -> list[dict[str, float]]:
    with (home / "metrics.csv").open(newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def test_a_sweep_over_two_processes_equals_single_runs(world):
    """Global batches of 4 records: 2 x 2 in two processes, 4 in one. 9 records: two batches and one left over, which
    two processes cannot share and drop, so 8 records are used."""
    common = ("data.limit=8", "model.lora.dropout=0")
    sweep = world / "sweep"
    status, printed = train(
        "-m", *settings(world, *common, *TWO, "ablation=text,noise", f"hydra.sweep.dir={sweep}"), log=world / "log"
    )
    assert status == 0, printed
    jobs = {"text": (sweep / "0_text_seed0", 1), "noise": (sweep / "1_noise_seed0", 2)}
    assert {job.name for job in sweep.iterdir() if (job / "results.json").exists()} == {
        job.name for job, _ in jobs.values()
    }
    for ablation, (job, stage) in jobs.items():
        alone = world / ablation
        assert (
            finish(
                settings(world, *common, "stages.1.batch_size=4", "stages.2.batch_size=4", f"ablation={ablation}"),
                alone,
            )
            == 0
        )
        single, double = losses(alone / f"stage_{stage}"), losses(job / f"stage_{stage}")
        assert len(single) == len(double) == 4
        assert any(abs(a["loss"] - single[0]["loss"]) > 0.01 for a in single), "it must learn something"
        for a, b in zip(single, double):
            assert a == pytest.approx(b, rel=1e-3, abs=1e-5), "metrics are means over the processes"
        one = load_file(alone / f"stage_{stage}" / "adapter" / "adapter_model.safetensors")
        two = load_file(job / f"stage_{stage}" / "adapter" / "adapter_model.safetensors")
        for name in one:
            torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
        assert (job / f"stage_{stage}" / "metrics.csv").read_text().count("epoch") == 1, "one process writes"


@pytest.mark.slow
def test_two_processes_stop_together_and_resume(world, tmp_path):
    """SIGTERM reaches the first process; both save, and both resume with the same dropout."""
    command = settings(world, *TWO, "data.limit=8", "ablation=text")
    status, printed = train(*command, f"hydra.run.dir={tmp_path}/whole", log=tmp_path / "log")
    assert status == 0, printed
    status, printed = train(
        *command, f"hydra.run.dir={tmp_path}/killed", log=tmp_path / "log", sabotage=at_step(1, 3, signal.SIGTERM)
    )
    assert status == 143, printed
    assert "stopped: SIGTERM: saved after step 3" in printed
    status, printed = train(*command, f"hydra.run.dir={tmp_path}/killed", "resume=true", log=tmp_path / "log")
    assert status == 0, printed
    assert losses(tmp_path / "killed" / "stage_1") == losses(tmp_path / "whole" / "stage_1")
