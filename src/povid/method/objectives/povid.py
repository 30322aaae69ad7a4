"""Stage 2 as the paper prints it: one sigmoid over all three responses (paper, Eq. 5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch.nn.functional import logsigmoid

from povid.method.objectives import Objective, Outcome, Terms


@dataclass(frozen=True)
class POVID(Objective):
    """-log sigmoid(alpha r(y_w|x) - (beta_1 r(y_l^t|x) + beta_2 r(y_l^n|x^n))), r = log pi/ref.

    A term that an ablation leaves out is Eq. 5 with that coefficient zero (ablation "noise": beta_1 = 0).

    Args:
        alpha: coefficient of the preferred response, more than 0.
        beta_text, beta_noise: beta_1 and beta_2, at least 0.
        differing_only: leave out of y_l^n the positions where it is y_w's own token, which the loss would otherwise
            raise and lower at once. The paper does not.
    """

    needs = frozenset({"preferred", "text", "noise"})
    optional = frozenset({"text", "noise"})

    alpha: Annotated[float, Field(gt=0)] = 0.1
    beta_text: Annotated[float, Field(ge=0)] = 0.05
    beta_noise: Annotated[float, Field(ge=0)] = 0.05
    differing_only: bool = False

    @property
    def scale(self) -> float:
        return self.alpha

    def __call__(self, policy: Terms, reference: Terms, tokens: Terms) -> Outcome:
        rewards = {"preferred": self.alpha * (policy.preferred - reference.preferred)}
        if policy.text is not None:
            rewards["text"] = self.beta_text * (policy.text - reference.text)
        if policy.noise is not None:
            rewards["noise"] = self.beta_noise * (policy.noise - reference.noise)
        dispreferred = sum(reward for name, reward in rewards.items() if name != "preferred")
        return Outcome(-logsigmoid(rewards["preferred"] - dispreferred), rewards)  # Eq. 5
