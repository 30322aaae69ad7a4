"""A step whose decoder layers are compiled gives the numbers of one whose layers are not."""

from __future__ import annotations

from functools import partial

import pytest
import tiny
import torch

from povid.internals import compiled, run_compiled
from povid.method.objectives.povid import POVID
from povid.model.loading import LoraSettings
from povid.training.datamodule import PreferenceDataset, collate
from povid.training.scoring import score

DROPOUT = LoraSettings(r=4, alpha=8, dropout=0.2)


def batches(folder, template):
    """Of one and of three records, so that nothing is compiled for one shape."""
    dataset = PreferenceDataset(tiny.triples(folder), template, tiny.noise(), seed=0)
    return [
        collate([dataset[i, 0] for i in rows], POVID.needs, packable=True, padding_id=2) for rows in ((0, 1, 3), (2,))
    ]


def losses(policy, made):
    """Loss and gradients of every batch, with the same dropout."""
    found = []
    for batch in made:
        torch.manual_seed(2)
        tokens_N = torch.arange(len(batch.preferred.preferred.token_N)) % 9 + 10
        outcome = POVID()(*score(policy, batch, POVID.needs, noise_tokens_N=tokens_N), batch.tokens)
        loss = outcome.loss_B.mean()
        found.append([loss, *torch.autograd.grad(loss, [p for g in policy.trained_parameters() for p in g])])
    return found


def check(tmp_path, recomputed):
    folder = tiny.save_tiny_llava(tmp_path / "tiny")
    options = {"lora": DROPOUT, "gradient_checkpointing": recomputed}
    eager, template = tiny.load(folder, **options)
    made = batches(tmp_path, template)
    one, other = losses(eager.train(), made), losses(tiny.load(folder, compile=True, **options)[0].train(), made)
    for expected, found in zip(one, other, strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-4, atol=1e-5)


@pytest.fixture
def traced(monkeypatch):
    """The compiler's front, without its back, which takes minutes; it raises where a layer cannot be read as a whole.

    Yields the graphs that were read.
    """
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    honest = torch.nn.Module.compile
    whole = partial(honest, backend=counter, fullgraph=True)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: whole(self, **options))
    yield counter
    torch._dynamo.reset()


def test_layers_are_read_as_a_whole_and_give_the_same_numbers(tmp_path, traced):
    """With the reference, packed and last-layer rows, LoRA's dropout and gradient checkpointing."""
    check(tmp_path, recomputed=True)
    assert 4 <= traced.frame_count <= 16


@pytest.mark.slow
@pytest.mark.parametrize("recomputed", [False, True])
def test_compiled_layers_give_the_same_numbers(tmp_path, recomputed):
    check(tmp_path, recomputed)


def test_answers_are_not_compiled(tmp_path):
    policy, _ = tiny.load(tiny.save_tiny_llava(tmp_path / "tiny"), compile=True)
    layers = policy.network.get_decoder().layers
    assert all(layer._compiled_call_impl is None for layer in policy.eval().network.get_decoder().layers)
    policy.train()
    assert all(layer._compiled_call_impl is not None for layer in layers)


def test_a_module_runs_what_it_is_told_to():
    linear = torch.nn.Linear(2, 2)
    call = compiled(linear)
    run_compiled(linear, lambda x: x + 1)
    assert torch.equal(linear(torch.zeros(2)), torch.ones(2))
    run_compiled(linear, None)
    assert call is not None and torch.equal(linear(torch.zeros(2)), linear.bias)
