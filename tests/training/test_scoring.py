"""The fast scoring equals the plain one, which is written here as obviously as it can be."""

from __future__ import annotations

import functools
from contextlib import contextmanager

import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from povid.method.objective import LogProbs
from povid.model.fused import FUSED, predicting_rows
from povid.model.packing import Encoded
from povid.training.datamodule import Example, NoiseSettings, PreferenceDataset, collate
from povid.training.module import ObjectiveSettings, POVIDModule, StageSettings
from povid.training.scoring import score

NOISE = NoiseSettings()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_tiny_llava(tmp_path_factory.mktemp("tiny"))


@contextmanager
def stock(network):
    """The modules as transformers and peft wrote them, without what povid.model.fused changes."""
    changed = [(module, type(module)) for module in network.modules() if type(module) in FUSED.values()]
    assert changed
    for module, kind in changed:
        module.__class__ = next(original for original, fused in FUSED.items() if fused is kind)
    yield
    for module, kind in changed:
        module.__class__ = kind


def plain_logits(network, encoded, pixels):
    """One sequence through the whole model: logits of every position but the last, [T - 1, V]."""
    return network(input_ids=torch.tensor([encoded.input_ids]), pixel_values=pixels).logits[0, :-1]


def plain_logp(logits, encoded, tokens=None):
    """Sum of log-probabilities of a conversation's response tokens (or of other tokens in their places)."""
    targets = torch.tensor(encoded.input_ids[1:])
    mask = torch.tensor(encoded.response[1:])
    targets = targets if tokens is None else tokens
    return (logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0] * mask).sum()


def plain_score(policy, examples, *, text, noise, released):
    """Per example and model: dict of log-probabilities; every sequence goes through the model by itself."""
    network = policy.network

    def one_model(example, chosen=None):
        pixels = example.images["pixel_values"].to(next(policy.parameters()).dtype)
        clean = plain_logits(network, example.preferred, pixels)
        result = {"preferred": plain_logp(clean, example.preferred)}
        if text:
            result["text"] = plain_logp(plain_logits(network, example.dispreferred, pixels), example.dispreferred)
        if noise:
            noised = plain_logits(network, example.preferred, example.noised["pixel_values"].to(pixels.dtype))
            own = noised.argmax(-1)
            chosen = own if chosen is None or released else chosen
            result["noise"] = plain_logp(clean if released else noised, example.preferred, chosen)
        return result, chosen

    ours, theirs = [], []
    with stock(network):
        for example in examples:
            result, chosen = one_model(example)
            ours.append(result)
            with policy.reference():
                theirs.append(one_model(example, chosen)[0])
    return ours, theirs


@pytest.fixture(scope="module")
def loaded(folder):
    """Each kind of policy is loaded once."""
    return functools.cache(lambda dtype, projector: tiny.load(folder, dtype=dtype, train_projector=projector))


def batch_of(folder, tmp_path, template, which, *, text, noise, packable=True):
    dataset = PreferenceDataset([tiny.triples(tmp_path)[i] for i in which], template, NOISE if noise else None, seed=3)
    examples = [dataset[i, 0] for i in range(len(which))]
    return examples, collate(examples, text=text, packable=packable, padding_id=2)


CASES = [(True, False, False), (True, True, False), (True, True, True), (False, True, False), (False, True, True)]


@pytest.mark.parametrize("which", [(0,), (2,), (1, 3), (3, 0, 2), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("projector", [True, False], ids=["projector", "frozen projector"])
@pytest.mark.parametrize(("text", "noise", "released"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_score_and_gradients_equal_the_plain_way(
    loaded, folder, tmp_path, which, projector, text, noise, released, dtype
):
    policy, template = loaded(dtype, projector)
    examples, batch = batch_of(folder, tmp_path, template, which, text=text, noise=noise)
    # RMSNorm and the rotary embedding work in float32 whatever the dtype, so float64 gains two digits, not nine.
    tolerance = {"rtol": 1e-5, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 1e-7, "atol": 1e-6}
    terms = frozenset(t for t, used in (("text", text), ("noise", noise)) if used)
    stage = StageSettings("stage", tuple(terms), 1, 1e-4, 1e-4, 1)
    module = POVIDModule(policy, ObjectiveSettings("released" if released else "paper"), stage, terms)
    parameters = [p for group in policy.trained_parameters() for p in group]

    batch = batch._replace(
        images={k: v.to(dtype) for k, v in batch.images.items()},
        noised=batch.noised and {k: v.to(dtype) for k, v in batch.noised.items()},
    )
    fast = score(policy, batch, noise_on_clean_image=released)
    fast_loss = module.loss(*fast, batch).loss_B
    fast_gradients = torch.autograd.grad(fast_loss.mean(), parameters)

    plain = plain_score(policy, examples, text=text, noise=noise, released=released)
    for ours, theirs in zip(fast, plain):
        for term in theirs[0]:
            torch.testing.assert_close(getattr(ours, term), torch.stack([entry[term] for entry in theirs]), **tolerance)
    as_logps = [
        type(fast[0])(
            *(torch.stack([e[t] for e in side]) if t in side[0] else None for t in ("preferred", "text", "noise"))
        )
        for side in plain
    ]
    plain_loss = module.loss(*as_logps, batch).loss_B
    torch.testing.assert_close(fast_loss, plain_loss, **tolerance)
    for ours, theirs in zip(fast_gradients, torch.autograd.grad(plain_loss.mean(), parameters)):
        assert (ours - theirs).norm() <= (1e-5 if dtype == torch.float32 else 1e-6) * (theirs.norm() + 1e-2)


def test_policy_without_training_is_its_reference(folder, tmp_path):
    policy, template = tiny.load(folder, perturb=False)
    _, batch = batch_of(folder, tmp_path, template, (0, 1), text=True, noise=True)
    ours, theirs = score(policy, batch)
    for term in ("preferred", "text", "noise"):
        torch.testing.assert_close(getattr(ours, term), getattr(theirs, term))


def test_reference_keeps_the_original_projector(folder, tmp_path):
    policy, template = tiny.load(folder, perturb=False)
    _, batch = batch_of(folder, tmp_path, template, (1,), text=True, noise=False)
    before = score(policy, batch)[1]
    for parameter in policy.trained_parameters()[1]:
        parameter.data += 0.5
    ours, theirs = score(policy, batch)
    assert torch.equal(before.preferred, theirs.preferred)
    assert not torch.allclose(ours.preferred, theirs.preferred)


def test_models_that_cannot_be_packed_are_scored_the_plain_way(folder, tmp_path):
    policy, template = tiny.load(folder)
    _examples, batch = batch_of(folder, tmp_path, template, (0, 1, 2), text=True, noise=True)
    fast = score(policy, batch)
    policy.packable = False
    _, apart = batch_of(folder, tmp_path, template, (0, 1, 2), text=True, noise=True, packable=False)
    slow = score(policy, apart)
    for one, other in zip((*fast[0], *fast[1]), (*slow[0], *slow[1])):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-5)


def sequences(draw, prefix):
    """A pair of random token sequences behind a prefix; few words, so that responses often begin alike."""
    word, mark = st.integers(4, 9), st.booleans()
    sides = []
    for _ in range(2):
        ids = draw(st.lists(word, min_size=1, max_size=draw(st.sampled_from([2, 6, 40]))))
        marks = draw(st.lists(mark, min_size=len(ids), max_size=len(ids)))
        marks[-1] = True
        sides.append(Encoded(prefix + ids, [False] * len(prefix) + marks))
    return sides


@st.composite
def batches(draw):
    """One to four examples of random lengths, in the first positions the image's sixteen tokens."""
    examples = []
    for number in range(draw(st.integers(1, 4))):
        prefix = [0] + [3] * 16 + draw(st.lists(st.integers(4, 9), max_size=20))
        pixels, eps = torch.randn(2, 1, 3, 32, 32, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
        w, l = sequences(draw, prefix)
        examples.append(
            Example(
                number, str(number), w, l, {"pixel_values": pixels}, {"pixel_values": pixels + eps}, f"digest {number}"
            )
        )
    return examples


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(examples=batches(), released=st.booleans(), projector=st.booleans())
def test_random_shapes_equal_the_plain_way(loaded, examples, released, projector):
    policy, _ = loaded(torch.float32, projector)
    batch = collate(examples, text=True, packable=True, padding_id=2)
    plain = plain_score(policy, examples, text=True, noise=True, released=released)
    fast = score(policy, batch, noise_on_clean_image=released)
    for ours, theirs in zip(fast, plain):
        for term in ("preferred", "text", "noise"):
            torch.testing.assert_close(
                getattr(ours, term), torch.stack([entry[term] for entry in theirs]), rtol=1e-5, atol=5e-5
            )
    if not released:
        cached = score(policy, batch, known_reference=LogProbs(fast[1].preferred, fast[1].text))
        for one, other in zip((*fast[0], *fast[1]), (*cached[0], *cached[1])):
            assert torch.equal(one, other)


def test_gradient_checkpointing_changes_nothing(folder, tmp_path):
    gradients = []
    for checkpointing in (False, True):
        policy, template = tiny.load(folder, gradient_checkpointing=checkpointing)
        policy.train()
        _, batch = batch_of(folder, tmp_path, template, (3, 0, 2), text=True, noise=True)
        calls = []
        policy.network.get_decoder().layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        ours, theirs = score(policy, batch)
        loss = sum((a - b).sum() for a, b in zip(ours, theirs))
        gradients.append(torch.autograd.grad(loss, [p for group in policy.trained_parameters() for p in group]))
        assert len(calls) == (6 if checkpointing else 4)  # policy and reference, clean and noised; two come again
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_last_layer_is_computed_where_tokens_are_predicted(loaded, folder, tmp_path):
    policy, template = loaded(torch.float32, True)
    _, batch = batch_of(folder, tmp_path, template, (0, 3), text=True, noise=False)
    seen = []
    layers = policy.network.get_decoder().layers
    hooks = [layer.mlp.register_forward_hook(lambda m, i, output: seen.append(output.shape[1])) for layer in layers]
    policy.predict(batch.pairs, policy.look(batch.images))
    for hook in hooks:
        hook.remove()
    length, predicting = batch.pairs.input_ids_BT.shape[1], batch.pairs.columns_BU.shape[1]
    assert seen == [length, predicting] and predicting < length
    with predicting_rows(policy.network.get_decoder(), batch.pairs) as place_U:
        assert torch.equal(place_U, batch.pairs.slot_U)
    assert layers[-1].rows_BU is None
