"""Every objective of conf/ against its formula written out over plain forward passes, losses and gradients.

The formulas below know nothing of packing, terms or rewards: they read the log-probability of every token.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor

from povid.method.distortions.crop import Crop
from povid.method.objectives import ON_DISTORTED
from povid.method.objectives.ddpo import DDPO
from povid.method.objectives.mdpo import MDPO
from povid.method.objectives.povid import POVID
from povid.training.datamodule import PreferenceDataModule, PreferenceDataset, collate
from povid.training.scoring import score

CONF = Path(__file__).resolve().parents[2] / "conf"
NAMES = sorted(file.stem for file in (CONF / "objective").glob("*.yaml"))
STAGES = {1: ("text",), 2: ("text", "noise")}


@dataclass
class Model:
    """Log-probabilities of the response tokens under one model, a tensor [tokens] each.

    ``w``, ``t``: y_w and y_l^t on x; ``wx``: y_w on x^n; ``n``: the policy's y_l^n on x^n; ``nc``: the model's own
    y_l^n on x; ``differs``: where y_l^n is not y_w's token.
    """

    w: Tensor
    t: Tensor
    wx: Tensor
    n: Tensor
    nc: Tensor
    differs: Tensor


def softplus(x: Tensor) -> Tensor:
    """-log sigmoid(-x)."""
    return (1 + x.exp()).log()


def logistic(x: Tensor) -> Tensor:
    return 1 / (1 + (-x).exp())


def dispreferred(p: Model, q: Model, dispreferences) -> list[tuple[Tensor, Tensor]]:
    return [pair for name, pair in (("text", (p.t, q.t)), ("noise", (p.n, q.n))) if name in dispreferences]


def mean(values: list[Tensor]) -> Tensor:
    return sum(values) / len(values)


def dpo(o, p, q, has):
    return softplus(-o.alpha * ((p.w - q.w).sum() - (p.t - q.t).sum()))


def povid(o, p, q, has):
    keep = p.differs if o.differing_only else torch.ones_like(p.n)
    text = o.beta_text * (p.t - q.t).sum() if "text" in has else 0
    noise = o.beta_noise * ((p.n - q.n) * keep).sum() if "noise" in has else 0
    return softplus(-(o.alpha * (p.w - q.w).sum() - (text + noise)))


def released(o, p, q, has):
    w = (p.w - q.w).sum()
    pairs = [(p.t - q.t).sum()] * ("text" in has) + [p.nc.sum() - q.nc.sum()] * ("noise" in has)
    return mean([softplus(-o.beta * (w - l)) for l in pairs])


def preferred_only(o, p, q, has):
    return -p.w.mean()


def ipo(o, p, q, has):
    w = (p.w - q.w).mean()
    return mean([(w - (a - b).mean() - 1 / (2 * o.beta)) ** 2 for a, b in dispreferred(p, q, has)])


def simpo(o, p, q, has):
    margins = [p.w.mean() - a.mean() for a, _ in dispreferred(p, q, has)]
    return mean([softplus(-o.beta * (margin - o.gamma_beta_ratio)) for margin in margins])


def apo_zero(o, p, q, has):
    lowered = mean([logistic(o.beta * (a - b).sum()) for a, b in dispreferred(p, q, has)])
    return 1 - logistic(o.beta * (p.w - q.w).sum()) + lowered


def rpo(o, p, q, has):
    inside = {"DPO": dpo, "POVID": povid}[type(o.objective).__name__]
    return inside(o.objective, p, q, has) - o.weight * p.w.mean()


def ddpo(o, p, q, has, weights):
    """The weights are those of ``token_weights``, which has a test by hand."""
    v, u = (torch.tensor(side).to(p.w) for side in weights)
    n = (lambda side: side.sum()) if o.mean else (lambda side: 1)
    w = ((p.w - q.w) * v).sum() / n(v)
    pairs = [((p.t - q.t) * u).sum() / n(u)] + [((p.n - q.n) * v).sum() / n(v)] * ("noise" in has)
    return mean([softplus(-o.beta * (w - l)) for l in pairs])


def mdpo(o, p, q, has):
    w = o.beta * (p.w - q.w).sum()
    loss = softplus(-(w - o.delta))
    if "text" in has:
        loss = loss + softplus(-(w - o.beta * (p.t - q.t).sum()))
    if "noise" in has:
        loss = loss + softplus(-(w - o.beta * (p.wx - q.wx).sum()))
    return loss


FORMULAS = {
    "paper": {1: dpo, 2: povid},
    "released": {1: dpo, 2: released},
    "preferred_only": preferred_only,
    "ipo": ipo,
    "simpo": simpo,
    "apo_zero": apo_zero,
    "rpo": rpo,
    "ddpo": ddpo,
    "mdpo": mdpo,
}


def objective_of(name: str, stage: int):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        node = compose(overrides=[f"+objective={name}"]).objective
    node = node if "_target_" in node else node[str(stage)]
    return instantiate({key: value for key, value in node.items() if key != "name"})


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return tiny.load(tiny.save_tiny_llava(folder), dtype=torch.float64), tiny.triples(folder)


def models(policy, example) -> tuple[Model, Model]:
    """Policy and reference, each sequence by itself through the whole network."""

    def tokens(encoded, pixels):
        marks = torch.tensor(encoded.response[1:])
        logits = policy.network(input_ids=torch.tensor([encoded.input_ids]), pixel_values=pixels.double()).logits
        return logits[0, :-1][marks].log_softmax(-1), torch.tensor(encoded.input_ids[1:])[marks]

    def at(logps, chosen):
        return logps.gather(-1, chosen[:, None])[:, 0]

    def one(noised, chosen=None):
        clean, w = tokens(example.preferred, example.images["pixel_values"])
        text, t = tokens(example.dispreferred, example.images["pixel_values"])
        distorted, _ = tokens(example.preferred, noised["pixel_values"])
        own = distorted.argmax(-1)
        chosen = own if chosen is None else chosen
        return Model(
            at(clean, w), at(text, t), at(distorted, w), at(distorted, chosen), at(clean, own), chosen != w
        ), chosen

    ours, chosen = one(example.noised)
    with policy.reference():
        theirs, _ = one(example.noised_for_reference or example.noised, chosen)
    return ours, theirs


def assert_equals_its_formula(loaded, objective, formula, dispreferences):
    (policy, template), triples = loaded
    terms = objective.terms(set(dispreferences))
    dataset = PreferenceDataset(triples, template, Crop(0.3, 0.6), 3, distorted_images=objective.distorted_images)
    examples = [dataset[i, 0] for i in (3, 0, 2)]
    batch = collate(examples, terms, packable=True, padding_id=2, weigh=objective.token_weights)
    batch = batch._replace(
        **{
            name: images and {key: value.double() for key, value in images.items()}
            for name, images in (
                ("images", batch.images),
                ("noised", batch.noised),
                ("noised_for_reference", batch.noised_for_reference),
            )
        }
    )
    parameters = [p for group in policy.trained_parameters() for p in group]
    scored = score(policy, batch, terms, with_reference=objective.reference, differing_only=objective.differing_only)
    loss_B, rewards = objective(*scored, batch.tokens)
    gradients = torch.autograd.grad(loss_B.mean(), parameters)
    assert rewards.keys() == {"preferred"} | ({"text", "noise"} & set(dispreferences) if len(terms) > 1 else set())
    assert all(reward_B.shape == loss_B.shape == (3,) for reward_B in rewards.values())

    written_out = []
    for example in examples:
        more = ()
        if objective.token_weights is not None:
            sides = (
                [t for t, m in zip(e.input_ids, e.response) if m] for e in (example.preferred, example.dispreferred)
            )
            more = (objective.token_weights(*sides),)
        written_out.append(formula(objective, *models(policy, example), dispreferences, *more))
    torch.testing.assert_close(loss_B, torch.stack(written_out), rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(gradients, torch.autograd.grad(torch.stack(written_out).mean(), parameters)):
        assert (ours - theirs).norm() <= 1e-5 * (theirs.norm() + 1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients_are_those_of_its_formula(loaded, name):
    found = FORMULAS[name]
    for stage, usable in STAGES.items():
        objective = objective_of(name, stage)
        formula = found[stage] if isinstance(found, dict) else found
        for dispreferences in (usable, ("noise",)) if stage == 2 else (usable,):
            if (name, dispreferences) == ("ddpo", ("noise",)):
                with pytest.raises(ValueError, match="DDPO needs text dispreferences"):
                    objective.terms(set(dispreferences))
                continue
            assert_equals_its_formula(loaded, objective, formula, dispreferences)


def test_choices_within_objectives_are_those_of_their_formulas(loaded):
    both = ("text", "noise")
    assert_equals_its_formula(loaded, POVID(0.3, 0.1, 0.2, differing_only=True), povid, both)
    assert_equals_its_formula(loaded, MDPO(0.3, delta=0.5, distorted_images=2), mdpo, both)
    assert_equals_its_formula(loaded, DDPO(0.3, weight=5.0, mean=True), ddpo, both)


@pytest.mark.parametrize("name", NAMES)
def test_passes_over_language_model_and_pictures(loaded, name, monkeypatch):
    """The counts of docs/objectives.md: (pictures seen, sequences through the language model) of each stage."""
    (policy, template), triples = loaded
    counted = {}
    look, predict = type(policy).look, type(policy).predict
    monkeypatch.setattr(type(policy), "look", lambda *a: (counted.update(look=counted["look"] + 1), look(*a))[1])
    monkeypatch.setattr(
        type(policy), "predict", lambda *a: (counted.update(predict=counted["predict"] + 1), predict(*a))[1]
    )
    found = []
    for stage, usable in STAGES.items():
        objective = objective_of(name, stage)
        terms = objective.terms(set(usable))
        noise = tiny.noise() if terms & ON_DISTORTED else None
        dataset = PreferenceDataset(triples, template, noise, 3, distorted_images=objective.distorted_images)
        batch = collate([dataset[0, 0]], terms, packable=True, padding_id=2, weigh=objective.token_weights)
        double = {key: value.double() for key, value in batch.images.items()}
        batch = batch._replace(images=double, noised=batch.noised and double)
        counted |= {"look": 0, "predict": 0}
        score(policy, batch, terms, with_reference=objective.reference)
        found.append((counted["look"], counted["predict"]))
    page = (CONF.parent / "docs" / "objectives.md").read_text()
    said = next(line for line in page.splitlines() if line.startswith(f"| `{name}` |")).split("|")[-2].strip()
    assert said == ", ".join(f"{pictures} + {sequences}" for pictures, sequences in found)


def test_simpo_trains_without_a_reference_or_its_cache(tmp_path, monkeypatch):
    import lightning as L

    policy, template = tiny.load(tiny.save_tiny_llava(tmp_path / "tiny"), perturb=False)
    monkeypatch.setattr(type(policy), "reference", lambda self: pytest.fail("the reference was scored"))
    simpo = objective_of("simpo", 2)
    terms = simpo.terms({"text", "noise"})
    stage = tiny.stage("text", "noise", epochs=2)
    module = tiny.module(policy, simpo, stage, terms, reference_cache=tmp_path / "cache")
    data = PreferenceDataModule(
        tiny.triples(tmp_path), template, terms=terms, distortion=Crop(), packable=True, batch_size=2, seed=0
    )
    trainer = L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        reload_dataloaders_every_n_epochs=1,
        use_distributed_sampler=False,
    )
    trainer.fit(module, data)
    assert trainer.global_step == 4 and not (tmp_path / "cache").exists()
