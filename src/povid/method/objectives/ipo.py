"""IPO: a squared distance from a fixed margin, which a response cannot overshoot without loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from povid.method.objectives import Objective, Outcome, Terms, mean_of_pairs


@dataclass(frozen=True)
class IPO(Objective):
    """(r(y_w)/|y_w| - r(y_l)/|y_l| - 1/(2 beta))^2, r = log pi/ref; with two dispreferred responses, the mean of both.

    y_l is y_l^t, y_l^n on x^n, or each of them in turn: what the stage has. The means over tokens are those of TRL's
    ``loss_type="ipo"``, which the authors of IPO confirmed.
    Source: arXiv 2310.12036, Eq. 17, where beta is called tau.

    Args:
        beta: more than 0; the margin that is aimed at is 1/(2 beta) per token.
    """

    needs = frozenset({"preferred", "text", "noise"})
    optional = frozenset({"text", "noise"})

    beta: Annotated[float, Field(gt=0)] = 0.1

    @property
    def scale(self) -> float:
        return self.beta

    def __call__(self, policy: Terms, reference: Terms, tokens: Terms) -> Outcome:
        rewards = {"preferred": (policy.preferred - reference.preferred) / tokens.preferred}
        losses = []
        for name, logp_B in policy.dispreferred.items():
            rewards[name] = (logp_B - getattr(reference, name)) / getattr(tokens, name)
            losses.append((rewards["preferred"] - rewards[name] - 1 / (2 * self.beta)) ** 2)  # Eq. 17
        return Outcome(mean_of_pairs(losses), rewards)
