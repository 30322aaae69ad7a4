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

from povid.run import answering

TWO = ("trainer=fsdp2", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true")
COMMON = ("data.limit=8", "ablation=both", "model.train_projector=true", "samples=2")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fsdp2")
    tiny.save_tiny_llava(folder / "tiny")
    return folder


def losses(home: Path) -> list[dict[str, float]]:
    with (home / "metrics.csv").open(newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def equal(whole: Path, split: Path) -> None:
    """Metrics and adapter of both stages agree within float error; the adapters' configuration and keys are equal, and
    so are the captions before training."""
    assert (whole / "captions_before.json").read_bytes() == (split / "captions_before.json").read_bytes()
    for stage in ("stage_1", "stage_2"):
        rows, others = losses(whole / stage), losses(split / stage)
        assert len(rows) == len(others) == 4
        assert any(abs(row["loss"] - rows[0]["loss"]) > 0.01 for row in rows), "it must learn something"
        for row, other in zip(rows, others):
            assert row == pytest.approx(other, rel=1e-3, abs=1e-5)
        one, two = whole / stage / "adapter", split / stage / "adapter"
        assert (one / "adapter_config.json").read_text() == (two / "adapter_config.json").read_text()
        a, b = (load_file(place / "adapter_model.safetensors") for place in (one, two))
        assert any("multi_modal_projector" in name for name in a)
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_split_weights_learn_what_whole_ones_learn(world):
    """Both stages, the second from the first one's adapter; gradients are clipped in every step."""
    clipped = ("model.lora.dropout=0", "stages.1.max_grad_norm=0.01", "stages.2.max_grad_norm=0.01")
    status, printed = train(*settings(world, *COMMON, *TWO, *clipped, f"hydra.run.dir={world}/two"), log=world / "log")
    assert status == 0, printed
    assert (
        finish(settings(world, *COMMON, *clipped, "stages.1.batch_size=4", "stages.2.batch_size=4"), world / "one") == 0
    )
    equal(world / "one", world / "two")


@pytest.mark.parametrize("devices", [1, 2])
def test_offloaded_weights_learn_what_whole_ones_learn(world, devices):
    """Gradients are clipped, which uses their norm over weights in the machine's memory. The single process is told
    that its device cannot hold the model, so that it captions and answers with split weights.
    """
    clipped = ("model.lora.dropout=0", "stages.1.max_grad_norm=0.01", "stages.2.max_grad_norm=0.01")
    offload = ("trainer=offload", f"trainer.devices={devices}", *TWO[1:2], *TWO[3:])
    sizes = () if devices == 2 else ("stages.1.batch_size=4", "stages.2.batch_size=4")
    folder = world / f"offloaded_{devices}"
    status, printed = train(
        *settings(world, *COMMON, *offload, *clipped, *sizes, f"hydra.run.dir={folder}"),
        log=world / "log",
        sabotage=lambda: setattr(answering, "fits", lambda *_: devices == 2),
    )
    assert status == 0, printed
    assert "the weights are split" in printed
    assert printed.count("it answers with its weights split") == (2 if devices == 1 else 0), "before and after"
    if not (world / "one" / "results.json").exists():
        assert (
            finish(settings(world, *COMMON, *clipped, "stages.1.batch_size=4", "stages.2.batch_size=4"), world / "one")
            == 0
        )
    equal(world / "one", folder)


def test_offload_reaches_fsdp2(monkeypatch):
    """On CUDA with pinned memory, which is copied faster."""
    from torch import nn
    from torch.distributed.fsdp import CPUOffloadPolicy

    from povid.training import sharding

    told = []
    monkeypatch.setattr(sharding, "fully_shard", lambda module, **options: told.append((module, options)))
    mesh = type("Mesh", (), {"device_type": "cuda"})()
    decoder = nn.Module()
    policy = type("Policy", (), {})()
    policy.settings = type("Settings", (), {"quantize": None})()
    policy.network = nn.Module()
    policy.network.get_decoder = lambda: decoder
    policy.network.get_input_embeddings = lambda: nn.Embedding(2, 2)
    for offload in (False, True):
        told.clear()
        sharding.shard(policy, mesh, offload=offload)
        assert [module for module, _ in told] == [decoder]
        kept = told[0][1].get("offload_policy")
        assert kept == (CPUOffloadPolicy(pin_memory=True) if offload else None)


def test_the_norm_of_offloaded_gradients_is_summed_in_the_machine(monkeypatch):
    from lightning.pytorch.strategies import ModelParallelStrategy

    from povid.training.sharding import FSDP2

    monkeypatch.setattr(ModelParallelStrategy, "_get_process_group_backend", lambda self: "nccl")
    assert FSDP2()._get_process_group_backend() == "nccl"
    assert FSDP2(offload=True)._get_process_group_backend() == "cpu:gloo,cuda:nccl"


@pytest.mark.slow
@pytest.mark.parametrize("offload", [False, True])
def test_split_weights_stop_and_resume(world, offload):
    command = settings(world, *COMMON, *TWO, f"trainer.strategy.offload={offload}", f"outputs={world}/{offload}")
    whole, killed = world / f"{offload}_whole", world / f"{offload}_killed"  # outside of outputs: no stage is reused
    status, printed = train(*command, f"hydra.run.dir={whole}", log=world / "log")
    assert status == 0, printed
    status, printed = train(
        *command, f"hydra.run.dir={killed}", log=world / "log", sabotage=at_step(1, 3, signal.SIGTERM)
    )
    assert status == 143, printed
    status, printed = train(*command, f"hydra.run.dir={killed}", "resume=true", log=world / "log")
    assert status == 0, printed
    for stage in ("stage_1", "stage_2"):
        assert losses(killed / stage) == losses(whole / stage)
