"""The control that sees no dispreference: fine-tuning on the preferred responses."""

from __future__ import annotations

from dataclasses import dataclass

from povid.method.objectives import Objective, Outcome, Terms


@dataclass(frozen=True)
class PreferredOnly(Objective):
    """Negative log-likelihood of y_w per token. The reference is used for the logged reward alone."""

    needs = frozenset({"preferred"})

    def __call__(self, policy: Terms, reference: Terms, tokens: Terms) -> Outcome:
        return Outcome(-policy.preferred / tokens.preferred, {"preferred": policy.preferred - reference.preferred})
