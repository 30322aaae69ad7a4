"""Two processes (gloo) that split the weights between them learn what one process learns."""

from __future__ import annotations

import csv
import signal
from pathlib import Path

import pytest
import tiny
import torch
from forks import at_step, finish, settings, train
from safetensors.torch import load_file

TWO = ("trainer=fsdp2", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true")
COMMON = ("data.limit=8", "ablation=both", "model.train_projector=true")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fsdp2")
    tiny.save_tiny_llava(folder / "tiny")
    return folder


def losses(home: Path) -> list[dict[str, float]]:
    with (home / "metrics.csv").open(newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def equal(ours: Path, theirs: Path) -> None:
    """Metrics and adapter of both stages are the same within float error, and the adapter's files the same in kind."""
    for stage in ("stage_1", "stage_2"):
        rows, others = losses(ours / stage), losses(theirs / stage)
        assert len(rows) == len(others) == 4
        assert any(abs(row["train/loss"] - rows[0]["train/loss"]) > 0.01 for row in rows), "it must learn something"
        for row, other in zip(rows, others):
            assert row == pytest.approx(other, rel=1e-3, abs=1e-5)
        one, two = ours / stage / "adapter", theirs / stage / "adapter"
        assert (one / "adapter_config.json").read_text() == (two / "adapter_config.json").read_text()
        mine, yours = (load_file(place / "adapter_model.safetensors") for place in (one, two))
        assert any("multi_modal_projector" in name for name in mine)
        assert mine.keys() == yours.keys()
        for name in mine:
            torch.testing.assert_close(mine[name], yours[name], rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_split_weights_learn_what_whole_ones_learn(world):
    """Both stages, the second one from the first one's adapter; gradients are clipped in every step."""
    clipped = ("model.lora.dropout=0", "stages.1.max_grad_norm=0.01", "stages.2.max_grad_norm=0.01")
    status, printed = train(*settings(world, *COMMON, *TWO, *clipped, f"hydra.run.dir={world}/two"), log=world / "log")
    assert status == 0, printed
    assert finish(settings(world, *COMMON, *clipped, "stages.1.batch_size=4", "stages.2.batch_size=4"),
                  world / "one") == 0
    equal(world / "one", world / "two")


@pytest.mark.slow
def test_split_weights_stop_and_go_on(world):
    command = settings(world, *COMMON, *TWO)
    status, printed = train(*command, f"hydra.run.dir={world}/whole", log=world / "log")
    assert status == 0, printed
    status, printed = train(*command, f"hydra.run.dir={world}/killed", log=world / "log",
                            sabotage=at_step(1, 3, signal.SIGTERM))
    assert status == 143, printed
    status, printed = train(*command, f"hydra.run.dir={world}/killed", "resume=true", log=world / "log")
    assert status == 0, printed
    for stage in ("stage_1", "stage_2"):
        assert losses(world / "killed" / stage) == losses(world / "whole" / stage)
