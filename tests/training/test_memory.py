"""The estimate of memory, and the batch size chosen by it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny
import torch

from povid.fault import Fault
from povid.method.objectives.dpo import DPO
from povid.training import memory
from povid.training.datamodule import PreferenceDataModule


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    policy, template = tiny.load(tiny.save_tiny_llava(folder))
    module = tiny.module(policy, DPO(), tiny.stage("text"), DPO.needs)
    data = PreferenceDataModule(
        tiny.triples(folder) * 4, template, terms=DPO.needs, packable=True, batch_size=1, seed=0
    )
    return module, data


def test_weights_and_adam_are_counted_exactly(ready):
    module, data = ready
    needs = memory.estimate(module, data, 1)
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert needs.weights == 4 * sum(p.numel() for p in module.parameters())
    assert needs.adapter == 12 * trained  # a gradient and two moments in float32
    assert 0 < needs.free <= needs.total
    assert "gradients and Adam" in str(needs) and "free of" in str(needs)


def test_activations_grow_with_the_batch(ready):
    module, data = ready
    one, four = (memory.estimate(module, data, size).step for size in (1, 4))
    assert 2 * one < four < 6 * one


def test_passes_without_gradient_keep_no_activations(ready):
    """So the reference adds nothing to the count."""
    module, data = ready
    with torch.no_grad():
        assert memory.kept_bytes(module, memory.longest(module, data, 1)) == 0


def test_estimating_restores_modes_gradients_and_random_state(ready):
    module, data = ready
    module.policy.eval()
    state = torch.random.get_rng_state()
    memory.estimate(module, data, 2)
    assert torch.equal(state, torch.random.get_rng_state())
    assert not any(part.training for part in module.policy.modules())
    assert all(p.grad is None for p in module.parameters())


def test_largest_batch_follows_the_memory(ready, monkeypatch):
    module, data = ready
    single = memory.estimate(module, data, 1)

    def chosen(free):
        monkeypatch.setattr(memory, "device_memory", lambda device: (int(free), int(free)))
        return memory.largest_batch(module, data)

    room = single.adapter / 0.9
    assert chosen(room + 5.5 * single.step / 0.9) == 4
    assert chosen(2**40) == 16  # all records
    with pytest.raises(Fault, match="not even one record"):
        chosen(room)
    module.policy.recompute(False)  # which was tried, too


def test_gradient_checkpointing_turns_itself_on_where_a_step_would_not_fit(ready, monkeypatch):
    module, data = ready
    policy = module.policy
    needs = memory.estimate(module, data, 2)

    def fitted(room, setting=None):
        monkeypatch.setattr(memory, "device_memory", lambda device: (int(room / 0.9) + 2, int(room / 0.9) + 2))
        monkeypatch.setattr(policy, "settings", policy.settings.model_copy(update={"gradient_checkpointing": setting}))
        return memory.fit(module, data, 2)

    try:
        fitting = needs.adapter + needs.step
        assert not fitted(fitting).recomputed and not policy.recomputes
        assert not fitted(0.99 * fitting, setting=False).recomputed and not policy.recomputes
        found = fitted(0.99 * fitting)
        assert found.recomputed and policy.recomputes
        assert needs.step > found.step > needs.step / 4
        assert re.search("gradient checkpointing is on, since a step takes about .* without it", str(found))
        assert memory.fit(module, data, 2).recomputed  # once decided
        single = memory.estimate(module, data, 1)
        for room, expected in ((single.adapter + 1.1 * single.step, 1), (single.adapter, None)):
            policy.recompute(False)
            monkeypatch.setattr(memory, "device_memory", lambda device: (int(room / 0.9), int(room / 0.9)))  # noqa: B023
            if expected:
                assert memory.largest_batch(module, data) == expected
            else:
                with pytest.raises(Fault, match="not even one record.*bfloat16"):
                    memory.largest_batch(module, data)
            assert policy.recomputes
    finally:
        policy.recompute(False)


def test_the_longest_records_are_measured(ready):
    module, data = ready
    batch = memory.longest(module, data, 2)
    assert max(data.lengths) == data.lengths[batch.records[0]] == data.lengths[batch.records[1]]


def test_batch_size_auto_needs_a_single_device():
    from hydra import compose, initialize_config_dir

    from povid.run.settings import build

    def checked(*overrides):
        with initialize_config_dir(str(Path(__file__).resolve().parents[2] / "conf"), version_base=None):
            return build(compose("config", [*overrides, "hydra.run.dir=."]))

    assert checked("stages.1.batch_size=auto").stages[1].batch_size == "auto"
    with pytest.raises(Fault, match="one device"):
        checked("stages.2.batch_size=auto", "trainer.devices=2")
    with pytest.raises(Fault, match="this trainer splits it"):
        checked("stages.2.batch_size=auto", "trainer=offload")
    with pytest.raises(Fault, match="trainer.strategy: found .*DeepSpeedStrategy with stage 3, which splits"):
        checked("trainer=deepspeed", "trainer.strategy.stage=3")
    assert checked("trainer=deepspeed").trainer["strategy"]["stage"] == 2
    with pytest.raises(Fault, match="model.compile: layers whose weights the trainer splits are not compiled"):
        checked("trainer=fsdp2", "model.compile=true")
    with pytest.raises(Fault, match="whole number or auto"):
        checked("stages.2.batch_size=many")
