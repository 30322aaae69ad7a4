"""Metrics under TRL's names, and when they are fetched from the device."""

from __future__ import annotations

import math

import pytest
import torch

from povid.method.objectives import Terms
from povid.method.objectives.dpo import DPO
from povid.method.objectives.povid import POVID
from povid.method.objectives.preferred_only import PreferredOnly
from povid.training.metrics import measure


def terms(**values: list[float]) -> Terms:
    return Terms(**{name: torch.tensor(value) for name, value in values.items()})


def measured(objective, policy: Terms, reference: Terms | None, tokens: Terms, **observed) -> dict[str, float]:
    outcome = objective(policy, reference, tokens)
    found = measure(outcome, policy, reference, tokens, observed, objective.scale)
    assert all(value.shape == () and not value.requires_grad for value in found.values())
    return {name: value.item() for name, value in found.items()}


def test_names_and_values_are_those_of_trl():
    """Two records, log pi/ref (1, -2) for y_w and (-1, -1) for y_l^t, alpha = 0.1: rewards .1, -.2 and -.1, -.1."""
    found = measured(
        DPO(),
        terms(preferred=[-4, -7], text=[-6, -6]),
        terms(preferred=[-5, -5], text=[-5, -5]),
        terms(preferred=[1, 2]),
    )
    assert found == pytest.approx(
        {
            "loss": (math.log1p(math.exp(-0.2)) + math.log1p(math.exp(0.1))) / 2,
            "rewards/chosen": -0.05,
            "rewards/rejected": -0.1,
            "rewards/margins": 0.05,
            "rewards/accuracies": 0.5,
            "weighted_rewards/chosen": -0.05,
            "weighted_rewards/rejected": -0.1,
            "logps/chosen": -5.5,
            "logps/rejected": -6.0,
            # log r = -1 over one token and 2 / 2 over two
            "kl": ((math.exp(-1) - 1 + 1) + (math.exp(1) - 1 - 1)) / 2,
        }
    )


def test_stage_2_is_on_the_scale_of_stage_1_beside_its_own_weights():
    """One record, log pi/ref 3, 1, -1 for y_w, y_l^t, y_l^n: rewards .3, .1, -.1; in the loss .3, .05, -.05."""
    policy = terms(preferred=[-2], text=[-4], noise=[-6])
    found = measured(
        POVID(), policy, terms(preferred=[-5], text=[-5], noise=[-5]), terms(preferred=[3]), noise_differs=torch.ones(1)
    )
    assert found["rewards/rejected"] == pytest.approx(0) and found["rewards/margins"] == pytest.approx(0.3)
    assert found["rewards/rejected_text"] == pytest.approx(0.1)
    assert found["rewards/margins_noise"] == pytest.approx(0.4)
    assert found["rewards/accuracies_text"] == found["rewards/accuracies_noise"] == 1
    assert found["weighted_rewards/rejected_text"] == pytest.approx(0.05)
    assert found["weighted_rewards/rejected_noise"] == pytest.approx(-0.05)
    assert (found["logps/rejected_noise"], found["noise_differs"]) == (-6, 1)


def test_what_is_not_there_is_not_logged():
    policy = terms(preferred=[-2.0])
    alone = measured(PreferredOnly(), policy, terms(preferred=[-3.0]), terms(preferred=[2.0]))
    assert set(alone) == {"loss", "rewards/chosen", "weighted_rewards/chosen", "logps/chosen", "kl"}
