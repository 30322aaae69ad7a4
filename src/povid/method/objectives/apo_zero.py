"""APO-zero: raise the preferred response and lower the dispreferred one, each against the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import sigmoid

from povid.method.objectives import Objective, Outcome, Terms, mean_of_pairs


@dataclass(frozen=True)
class APOZero(Objective):
    """1 - sigmoid(beta r(y_w)) + sigmoid(beta r(y_l)), r = log pi/ref; with two dispreferred responses, their mean.

    y_l is y_l^t, y_l^n on x^n, or each of them in turn: what the stage has. DPO's margin can also grow while both
    responses become less likely; this loss cannot fall so.
    Sources: arXiv 2408.06266, Eq. 7; TRL's ``loss_type="apo_zero"``.

    Args:
        beta: scale of the rewards, more than 0.
    """

    needs = frozenset({"preferred", "text", "noise"})
    optional = frozenset({"text", "noise"})

    beta: Annotated[float, Field(gt=0)] = 0.1

    @property
    def scale(self) -> float:
        return self.beta

    def __call__(self, policy: Terms, reference: Terms, tokens: Terms) -> Outcome:
        rewards = {"preferred": self.beta * (policy.preferred - reference.preferred)}
        lowered = []
        for name, logp_B in policy.dispreferred.items():
            rewards[name] = self.beta * (logp_B - getattr(reference, name))
            lowered.append(sigmoid(rewards[name]))
        return Outcome(1 - sigmoid(rewards["preferred"]) + mean_of_pairs(lowered), rewards)  # Eq. 7
