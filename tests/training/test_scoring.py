"""The fast scoring equals a plain one, written here as simply as possible."""

from __future__ import annotations

import functools
from contextlib import contextmanager

import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from povid.method.objectives import ON_DISTORTED, Objective, Outcome, Terms
from povid.method.objectives.dpo import DPO
from povid.method.objectives.povid import POVID
from povid.method.objectives.released import Released
from povid.model.fused import FUSED, predicting_rows
from povid.model.loading import LoraSettings
from povid.model.packing import Encoded
from povid.training.datamodule import Example, PreferenceDataset, collate
from povid.training.scoring import score


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


def plain_score(policy, examples, terms):
    """Log-probabilities [B] of the terms for each model; each sequence goes through the model separately."""
    network = policy.network

    def one_model(example, chosen=None):
        pixels = example.images["pixel_values"].to(next(policy.parameters()).dtype)
        clean = plain_logits(network, example.preferred, pixels)
        result = {"preferred": plain_logp(clean, example.preferred)}
        if "text" in terms:
            result["text"] = plain_logp(plain_logits(network, example.dispreferred, pixels), example.dispreferred)
        if terms & ON_DISTORTED:
            distorted = plain_logits(network, example.preferred, example.noised["pixel_values"].to(pixels.dtype))
            own = distorted.argmax(-1)
            chosen = own if chosen is None else chosen
            if "noise" in terms:
                result["noise"] = plain_logp(distorted, example.preferred, chosen)
            if "noise_on_clean" in terms:
                result["noise_on_clean"] = plain_logp(clean, example.preferred, own)
            if "preferred_on_distorted" in terms:
                result["preferred_on_distorted"] = plain_logp(distorted, example.preferred)
        return result, chosen

    ours, theirs = [], []
    with stock(network):
        for example in examples:
            result, chosen = one_model(example)
            ours.append(result)
            with policy.reference():
                theirs.append(one_model(example, chosen)[0])
    return tuple(
        Terms(**{term: torch.stack([result[term] for result in results]) for term in terms})
        for results in (ours, theirs)
    )


@pytest.fixture(scope="module")
def loaded(folder):
    """Each kind of policy is loaded once."""
    return functools.cache(lambda dtype, projector: tiny.load(folder, dtype=dtype, train_projector=projector))


def batch_of(folder, tmp_path, template, which, terms, *, packable=True):
    dataset = PreferenceDataset(
        [tiny.triples(tmp_path)[i] for i in which], template, tiny.noise() if terms & ON_DISTORTED else None, seed=3
    )
    examples = [dataset[i, 0] for i in range(len(which))]
    return examples, collate(examples, terms, packable=packable, padding_id=2)


class EveryTerm(Objective):
    """Reads every term."""

    needs = frozenset(Terms._fields)

    def __call__(self, policy, reference, tokens):
        loss_B = sum((i + 1) * (p - 0.5 * r) / n for i, (p, r, n) in enumerate(zip(policy, reference, tokens)))
        return Outcome(loss_B, {})


ALL = frozenset({"preferred", "text", "noise"})
OBJECTIVES = {
    "Eq. 3": (DPO(), {"preferred", "text"}),
    "Eq. 5": (POVID(), ALL),
    "Eq. 5, noise alone": (POVID(), {"preferred", "noise"}),
    "released": (Released(), {"preferred", "text", "noise_on_clean"}),
    "released, noise alone": (Released(), {"preferred", "noise_on_clean"}),
    "every term": (EveryTerm(), EveryTerm.needs),
}


def assert_terms_close(found, expected, **tolerance):
    for term, values in zip(Terms._fields, expected):
        assert (values is None) == (getattr(found, term) is None)
        if values is not None:
            torch.testing.assert_close(getattr(found, term), values, **tolerance)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_scores_and_gradients_equal_the_plain_way(loaded, folder, tmp_path, name, dtype):
    objective, terms = OBJECTIVES[name]
    # RMSNorm and the rotary embedding work in float32 whatever the dtype, so float64 gains two digits, not nine.
    tolerance = {"rtol": 1e-5, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 1e-7, "atol": 1e-6}
    for projector in (True, False):
        policy, template = loaded(dtype, projector)
        parameters = [p for group in policy.trained_parameters() for p in group]
        for which in ((0,), (2,), (1, 3), (3, 0, 2), (0, 1, 2, 3)):
            examples, batch = batch_of(folder, tmp_path, template, which, terms)
            batch = batch._replace(
                images={k: v.to(dtype) for k, v in batch.images.items()},
                noised=batch.noised and {k: v.to(dtype) for k, v in batch.noised.items()},
            )
            fast = score(policy, batch, terms)
            fast_loss = objective(*fast, batch.tokens).loss_B
            fast_gradients = torch.autograd.grad(fast_loss.mean(), parameters)

            plain = plain_score(policy, examples, terms)
            for ours, theirs in zip(fast, plain):
                assert_terms_close(ours, theirs, **tolerance)
            plain_loss = objective(*plain, batch.tokens).loss_B
            torch.testing.assert_close(fast_loss, plain_loss, **tolerance)
            for ours, theirs in zip(fast_gradients, torch.autograd.grad(plain_loss.mean(), parameters)):
                assert (ours - theirs).norm() <= (1e-5 if dtype == torch.float32 else 1e-6) * (theirs.norm() + 1e-2)


def test_an_objective_without_reference_runs_none(loaded, folder, tmp_path, monkeypatch):
    policy, template = loaded(torch.float32, True)
    _, batch = batch_of(folder, tmp_path, template, (0, 1), ALL)
    monkeypatch.setattr(type(policy), "reference", lambda self: pytest.fail("the reference was scored"))
    ours, reference = score(policy, batch, ALL, with_reference=False)
    assert reference is None
    assert ours.noise is not None


def test_weighted_tokens_are_weighted_sums(loaded, folder, tmp_path):
    """Each token's log-probability times its weight; the token counts are the sums of the weights."""
    policy, template = loaded(torch.float32, True)
    examples, batch = batch_of(folder, tmp_path, template, (1, 2), ALL)

    def weigh(preferred, dispreferred):
        return [1.0 + i for i in range(len(preferred))], [0.5] * len(dispreferred)

    weighted = collate(examples, ALL, packable=True, padding_id=2, weigh=weigh)
    plain, _ = score(policy, batch, ALL)
    found, _ = score(policy, weighted, ALL)
    torch.testing.assert_close(found.text, 0.5 * plain.text)
    lengths = batch.tokens.preferred
    assert weighted.tokens.preferred.tolist() == [n * (n + 1) / 2 for n in lengths.tolist()]
    with stock(policy.network):
        for i, example in enumerate(examples):
            logits = plain_logits(policy.network, example.preferred, example.images["pixel_values"])
            targets, marks = torch.tensor(example.preferred.input_ids[1:]), torch.tensor(example.preferred.response[1:])
            logps = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0][marks]
            torch.testing.assert_close(found.preferred[i], (logps * torch.arange(1, len(logps) + 1)).sum())


def test_policy_without_training_is_its_reference(folder, tmp_path):
    policy, template = tiny.load(folder, perturb=False)
    _, batch = batch_of(folder, tmp_path, template, (0, 1), ALL)
    assert_terms_close(*score(policy, batch, ALL))


def test_reference_keeps_the_original_projector(folder, tmp_path):
    policy, template = tiny.load(folder, perturb=False)
    _, batch = batch_of(folder, tmp_path, template, (1,), DPO.needs)
    before = score(policy, batch, DPO.needs)[1]
    for parameter in policy.trained_parameters()[1]:
        parameter.data += 0.5
    ours, theirs = score(policy, batch, DPO.needs)
    assert torch.equal(before.preferred, theirs.preferred)
    assert not torch.allclose(ours.preferred, theirs.preferred)


def test_models_that_cannot_be_packed_are_scored_the_plain_way(folder, tmp_path):
    policy, template = tiny.load(folder)
    _, batch = batch_of(folder, tmp_path, template, (0, 1, 2), ALL)
    fast = score(policy, batch, ALL)
    policy.packable = False
    _, apart = batch_of(folder, tmp_path, template, (0, 1, 2), ALL, packable=False)
    slow = score(policy, apart, ALL)
    for one, other in zip(fast, slow):
        assert_terms_close(one, other, rtol=1e-5, atol=2e-5)


def sequences(draw, prefix):
    """A pair of random token sequences behind a prefix; few words, so that responses often begin with the same ones."""
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
@given(examples=batches(), projector=st.booleans())
def test_random_shapes_equal_the_plain_way(loaded, examples, projector):
    policy, _ = loaded(torch.float32, projector)
    terms = EveryTerm.needs
    batch = collate(examples, terms, packable=True, padding_id=2)
    for ours, theirs in zip(score(policy, batch, terms), plain_score(policy, examples, terms)):
        assert_terms_close(ours, theirs, rtol=1e-5, atol=5e-5)
    fast = score(policy, batch, ALL)
    known = Terms(fast[1].preferred, fast[1].text)
    for one, other in zip(fast, score(policy, batch, ALL, known_reference=known)):
        assert_terms_close(one, other, rtol=0, atol=0)


def test_gradient_checkpointing_changes_no_digit(folder, tmp_path):
    """So it belongs to no identity; the last layer's rows and LoRA's dropout are the same when they are recomputed."""
    found = []
    for checkpointing in (False, True):
        policy, template = tiny.load(
            folder, gradient_checkpointing=checkpointing, lora=LoraSettings(r=4, alpha=8, dropout=0.3)
        )
        policy.train()
        _, batch = batch_of(folder, tmp_path, template, (3, 0, 2), ALL)
        calls = []
        for layer in policy.network.get_decoder().layers:
            layer.mlp.register_forward_pre_hook(lambda _, x, calls=calls: calls.append(x[0].shape[1]))
        torch.manual_seed(4)
        ours, theirs = score(policy, batch, ALL)
        loss = sum((a - b).sum() for a, b in zip(ours[:3], theirs[:3]))
        parameters = [p for group in policy.trained_parameters() for p in group]
        found.append([loss, *torch.autograd.grad(loss, parameters)])
        # Two layers, for policy and reference, clean and noised; the policy's two passes are recomputed.
        assert len(calls) == (12 if checkpointing else 8) and len(set(calls)) == 4
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_last_layer_is_computed_where_tokens_are_predicted(loaded, folder, tmp_path):
    policy, template = loaded(torch.float32, True)
    _, batch = batch_of(folder, tmp_path, template, (0, 3), DPO.needs)
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
