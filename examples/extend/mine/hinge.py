"""An objective: a hinge instead of the sigmoid of Eq. 3 and Eq. 5."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from povid.method.objectives import Objective, Outcome, Terms


@dataclass(frozen=True)
class Hinge(Objective):
    """max(0, 1 - (alpha r(y_w|x) - mean of alpha r(y_l))), r = log pi/ref, over the dispreferred responses in use.

    Once the preferred response leads by 1, an example has no gradient. With one dispreferred response this is RSO's
    hinge-norm loss (arXiv 2309.06657). One class serves both stages: y_l is y_l^t in stage 1, y_l^t and y_l^n on x^n in
    stage 2, and an ablation may leave out either.

    Args:
        alpha: strength of the Kullback-Leibler constraint, more than 0.
    """

    needs = frozenset({"preferred", "text", "noise"})
    optional = frozenset({"text", "noise"})

    alpha: Annotated[float, Field(gt=0)] = 0.1

    @property
    def scale(self) -> float:
        return self.alpha

    def __call__(self, policy: Terms, reference: Terms, tokens: Terms) -> Outcome:
        rewards = {"preferred": self.alpha * (policy.preferred - reference.preferred)}
        dispreferred = [name for name in ("text", "noise") if getattr(policy, name) is not None]
        for name in dispreferred:
            ratio_B = getattr(policy, name) - getattr(reference, name)
            rewards[name] = self.alpha / len(dispreferred) * ratio_B
        margin_B = rewards["preferred"] - sum(rewards[name] for name in dispreferred)
        return Outcome((1 - margin_B).relu(), rewards)
