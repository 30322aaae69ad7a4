"""Stage 2 as the released code computes it: the weighted mean of two DPO losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, cast

from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from povid.method.objectives import Objective, Outcome, Terms


@dataclass(frozen=True)
class Released(Objective):
    """Mean of DPO on (y_w, y_l^t) and DPO on (y_w, y_l^n), y_l^n scored on the clean image.

    Where the ablation leaves one of the two out the other stands alone: weights are divided by their sum.
    Source: YiyangZhou/POVID, tool/dpo_trainer_inherent.py, which weights each pair by one half.

    Args:
        beta: strength of the Kullback-Leibler constraint, more than 0.
        weight_text, weight_noise: of the two pairs, more than 0.
    """

    needs = frozenset({"preferred", "text", "noise_on_clean"})
    optional = frozenset({"text", "noise_on_clean"})

    beta: Annotated[float, Field(gt=0)] = 0.1
    weight_text: Annotated[float, Field(gt=0)] = 0.5
    weight_noise: Annotated[float, Field(gt=0)] = 0.5

    @property
    def scale(self) -> float:
        return self.beta

    def __call__(self, policy: Terms, reference: Terms, tokens: Terms) -> Outcome:
        rewards = {"preferred": self.beta * (policy.preferred - reference.preferred)}
        weights = {}
        if policy.text is not None:
            rewards["text"] = self.beta * (policy.text - reference.text)
            weights["text"] = self.weight_text
        if policy.noise_on_clean is not None:
            rewards["noise"] = self.beta * (policy.noise_on_clean - reference.noise_on_clean)
            weights["noise"] = self.weight_noise
        total = sum(weights.values())
        losses = (
            weight / total * -logsigmoid(rewards["preferred"] - rewards[name]) for name, weight in weights.items()
        )
        return Outcome(cast(Tensor, sum(losses)), rewards)
