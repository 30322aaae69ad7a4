"""Any objective, and the likelihood of the preferred response beside it."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from povid.method.objectives import Objective, Outcome, Terms


@dataclass(frozen=True)
class RPO(Objective):
    """The objective's loss - weight * log pi(y_w|x)/|y_w|.

    The likelihood keeps y_w from becoming less likely while the margin grows. Around an objective that weights tokens
    it is a weighted mean. The rewards are the objective's.
    Sources: arXiv 2404.19733, Eq. 1; TRL's ``loss_type=["sigmoid", "sft"]``, whose mean runs over all tokens of a
    batch; RLHF-V/RLAIF-V's ``SFT_weight``, there of the sum.

    Args:
        objective: any other objective.
        weight: of the likelihood, at least 0.

    Raises:
        ValueError: ``objective`` is not an objective.
    """

    objective: Objective
    weight: Annotated[float, Field(ge=0)] = 1.0

    def __post_init__(self) -> None:
        inner: Any = self.objective
        if not isinstance(inner, Objective):
            raise ValueError(f"objective: found {inner!r}, needed the _target_ of an objective")
        for name in Objective.__annotations__:  # what is scored is what the objective asks for
            object.__setattr__(self, name, getattr(inner, name))
        object.__setattr__(self, "needs", inner.needs | {"preferred"})

    @property
    def scale(self) -> float:
        return self.objective.scale

    def terms(self, dispreferences: Set[str]) -> frozenset[str]:
        return self.objective.terms(dispreferences) | {"preferred"}

    def __call__(self, policy: Terms, reference: Terms, tokens: Terms) -> Outcome:
        loss_B, rewards = self.objective(policy, reference, tokens)
        return Outcome(loss_B - self.weight * policy.preferred / tokens.preferred, rewards)
