"""TRL's own DPOTrainer as a second opinion for the objectives that it has, gradients included."""

from __future__ import annotations

import pytest
import torch

from povid.bench.subject import SHAPES, adapt, build_model, build_processor, steps, twin
from povid.method.objectives import Terms
from povid.method.objectives.apo_zero import APOZero
from povid.method.objectives.dpo import DPO
from povid.method.objectives.ipo import IPO
from povid.method.objectives.rpo import RPO
from povid.training.scoring import score


@pytest.mark.parametrize(
    ("objective", "beta", "loss_type"),
    [
        (DPO(), 0.1, "sigmoid"),  # Eq. 3
        (IPO(0.2), 0.2, "ipo"),
        (APOZero(0.3), 0.3, "apo_zero"),
        (RPO(DPO(0.2)), 0.2, ["sigmoid", "sft"]),
    ],
    ids=["dpo", "ipo", "apo_zero", "rpo"],
)
def test_losses_and_gradients_are_trls(objective, beta, loss_type):
    """The responses of a batch are of one length, so that TRL's mean over a batch's tokens is the mean over means."""
    pytest.importorskip("trl", reason="TRL is not installed (extra: bench)")
    from povid.bench.trl_arm import trl_dpo

    shape = SHAPES["smallest"]
    processor, base = build_processor(shape), build_model(shape, device="cpu")
    policy = adapt(twin(base), processor, shape)
    arm, parameters = trl_dpo(policy, base, processor, checkpoint=False, beta=beta, loss_type=loss_type)
    mine = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    terms = objective.terms({"text"})
    for step in steps(shape, processor, count=2, batch_size=2, device="cpu"):
        theirs = arm.run(step, None)
        loss = objective(*score(policy, step.text, terms), step.text.tokens).loss_B.mean()
        loss.backward()
        assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)
        assert loss.item() != pytest.approx(first(objective), abs=1e-4)
    for ours, theirs in zip(mine, parameters, strict=True):
        assert ours.shape == theirs.shape and theirs.grad.norm() > 0
        assert (ours.grad - theirs.grad).norm() <= 1e-3 * theirs.grad.norm()


def first(objective) -> float:
    """The loss at policy = reference, which would say nothing about either."""
    one = Terms(torch.ones(1), torch.ones(1))
    return objective(one, one, one).loss_B.item()
