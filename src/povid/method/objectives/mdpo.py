"""mDPO: prefer a response on its own image to the same response on a distorted one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, cast

from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from povid.method.objectives import Objective, Outcome, Terms


@dataclass(frozen=True)
class MDPO(Objective):
    """The sum of three losses, with r = log pi/ref and x~ the distorted image:

    - -log sigmoid(beta (r(y_w|x) - r(y_l^t|x))), the response preference;
    - -log sigmoid(beta (r(y_w|x) - r(y_w|x~))), the image preference;
    - -log sigmoid(beta r(y_w|x) - delta), the anchor, which keeps y_w from becoming less likely.

    The first or the second is left out where the ablation has no text or no noise dispreference.
    Sources: arXiv 2406.11839, Eq. 4 to 6; luka-group/mDPO, mdpo_trainer.py.

    Args:
        beta: strength of the Kullback-Leibler constraint, more than 0.
        delta: reward of y_w that the anchor aims at, at least 0.
        distorted_images: 1: policy and reference see the same x~; 2: each sees one of its own, as in the authors' code,
            which draws a crop in every forward pass.
    """

    needs = frozenset({"preferred", "text", "preferred_on_distorted"})
    optional = frozenset({"text", "preferred_on_distorted"})

    beta: Annotated[float, Field(gt=0)] = 0.1
    delta: Annotated[float, Field(ge=0)] = 0.0
    distorted_images: Literal[1, 2] = 1

    @property
    def scale(self) -> float:
        return self.beta

    def __call__(self, policy: Terms, reference: Terms, tokens: Terms) -> Outcome:
        rewards = {"preferred": self.beta * (policy.preferred - reference.preferred)}
        if policy.text is not None:
            rewards["text"] = self.beta * (policy.text - reference.text)
        if policy.preferred_on_distorted is not None:
            rewards["noise"] = self.beta * (policy.preferred_on_distorted - reference.preferred_on_distorted)
        losses = [-logsigmoid(rewards["preferred"] - rewards[name]) for name in rewards if name != "preferred"]
        anchor_B = -logsigmoid(rewards["preferred"] - self.delta)
        return Outcome(cast(Tensor, sum(losses, anchor_B)), rewards)
