"""A step whose decoder layers are compiled gives the numbers of one whose layers are not."""

from __future__ import annotations

from functools import partialmethod

import pytest
import tiny
import torch

from povid.internals import compiled, run_compiled
from povid.method.objectives.dpo import DPO
from povid.method.objectives.povid import POVID
from povid.model.loading import LoraSettings
from povid.training.datamodule import PreferenceDataset, collate
from povid.training.scoring import score


def losses(policy, template, objective, folder, *rows):
    """Loss and gradients of a batch for each of ``rows``, with the same dropout."""
    dataset, found = PreferenceDataset(tiny.triples(folder), template, tiny.noise(), seed=0), []
    for numbers in rows:
        batch = collate([dataset[i, 0] for i in numbers], objective.needs, packable=True, padding_id=2)
        torch.manual_seed(2)
        tokens_N = None if batch.preferred is None else torch.full_like(batch.preferred.preferred.token_N, 9)
        outcome = objective(*score(policy, batch, objective.needs, noise_tokens_N=tokens_N), batch.tokens)
        loss = outcome.loss_B.mean()
        found.append([loss, *torch.autograd.grad(loss, [p for group in policy.trained_parameters() for p in group])])
    return found


def check(folder, objective, *rows, recomputed):
    tiny.save_tiny_llava(folder / "tiny")
    options = {"lora": LoraSettings(r=4, alpha=8, dropout=0.2), "gradient_checkpointing": recomputed}
    found = []
    for compile_layers in (False, True):
        policy, template = tiny.load(folder / "tiny", compile=compile_layers, **options)
        found.append(losses(policy.train(), template, objective, folder, *rows))
    for eager, other in zip(*found, strict=True):
        torch.testing.assert_close(other, eager, rtol=2e-4, atol=1e-5)


def test_layers_are_read_as_a_whole_and_give_the_same_numbers(tmp_path, monkeypatch):
    """By the compiler's front alone, which raises here where it cannot read a layer as a whole: policy and reference,
    a packed batch, the last layer's rows, LoRA's dropout, gradient checkpointing."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    graphs, honest = CompileCounterWithBackend("aot_eager"), torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(honest, backend=graphs, fullgraph=True))
    check(tmp_path, DPO(), (0, 1, 3), recomputed=True)
    assert 4 <= graphs.frame_count <= 8  # policy and reference, the first layer and the last
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("recomputed", [False, True])
def test_compiled_layers_give_the_same_numbers(tmp_path, recomputed):
    """By the whole compiler, for batches of three records and of one."""
    check(tmp_path, POVID(), (0, 1, 3), (2,), recomputed=recomputed)


def test_only_what_trains_is_compiled(tmp_path):
    policy, _ = tiny.load(tiny.save_tiny_llava(tmp_path / "tiny"), compile=True)
    for training in (False, True):
        policy.train(training)
        layers = policy.network.get_decoder().layers
        assert [layer._compiled_call_impl is not None for layer in layers] == [training] * 2


def test_a_module_runs_what_it_is_told_to():
    linear = torch.nn.Linear(2, 2)
    call = compiled(linear)
    run_compiled(linear, lambda x: x + 1)
    assert torch.equal(linear(torch.zeros(2)), torch.ones(2))
    run_compiled(linear, None)
    assert call is not None and torch.equal(linear(torch.zeros(2)), linear.bias)
