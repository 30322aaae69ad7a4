"""SimPO: the margin of mean log-probabilities, without a reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch.nn.functional import logsigmoid

from povid.method.objectives import Objective, Outcome, Terms, mean_of_pairs


@dataclass(frozen=True)
class SimPO(Objective):
    """-log sigmoid(beta (log pi(y_w)/|y_w| - log pi(y_l)/|y_l|) - gamma); with two dispreferred responses, the mean.

    y_l is y_l^t, y_l^n on x^n, or each of them in turn: what the stage has. The reference is never run.
    Sources: arXiv 2405.14734, Eq. 6; ContextualAI/HALOs, config/loss/simpo.yaml for names and values.

    Args:
        beta: scale of the rewards, more than 0.
        gamma_beta_ratio: gamma/beta, the margin that is aimed at in mean log-probability per token, at least 0.
    """

    needs = frozenset({"preferred", "text", "noise"})
    optional = frozenset({"text", "noise"})
    reference = False

    beta: Annotated[float, Field(gt=0)] = 10.0
    gamma_beta_ratio: Annotated[float, Field(ge=0)] = 0.3

    @property
    def scale(self) -> float:
        return self.beta

    def __call__(self, policy: Terms, reference: Terms | None, tokens: Terms) -> Outcome:
        gamma = self.gamma_beta_ratio * self.beta
        rewards = {"preferred": self.beta * policy.preferred / tokens.preferred}
        losses = []
        for name, logp_B in policy.dispreferred.items():
            rewards[name] = self.beta * logp_B / getattr(tokens, name)
            losses.append(-logsigmoid(rewards["preferred"] - rewards[name] - gamma))  # Eq. 6
        return Outcome(mean_of_pairs(losses), rewards)
