"""Stage 1: DPO between the preferred and the text-dispreferred response (paper, Eq. 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch.nn.functional import logsigmoid

from povid.method.objectives import Objective, Outcome, Terms


@dataclass(frozen=True)
class DPO(Objective):
    """-log sigmoid(alpha [log pi/ref](y_w|x) - alpha [log pi/ref](y_l^t|x)).

    Args:
        alpha: strength of the Kullback-Leibler constraint, more than 0 (DPO's own paper calls it beta).
    """

    needs = frozenset({"preferred", "text"})

    alpha: Annotated[float, Field(gt=0)] = 0.1

    @property
    def scale(self) -> float:
        return self.alpha

    def __call__(self, policy: Terms, reference: Terms, tokens: Terms) -> Outcome:
        reward_w = self.alpha * (policy.preferred - reference.preferred)
        reward_t = self.alpha * (policy.text - reference.text)
        return Outcome(-logsigmoid(reward_w - reward_t), {"preferred": reward_w, "text": reward_t})  # Eq. 3
