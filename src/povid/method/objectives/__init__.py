"""Objectives: pure functions of log-probabilities, one file each.

An objective names what must be scored (``needs``, fields of :class:`Terms`) and turns scores into a loss; scoring finds
the fewest passes. y_w is the preferred response, y_l^t the text dispreferred one, y_l^n what the policy itself would
say of the distorted image x^n. Shape suffix: B = examples of a batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Set
from typing import ClassVar, NamedTuple

from torch import Tensor


class Terms(NamedTuple):
    """One tensor [B] for each response that an objective can read; ``None`` for what is not scored.

    Used for log-probabilities (sums over a response's tokens, end token included, prompt and image excluded) and for
    the number of tokens behind each sum.

    Attributes:
        preferred: y_w on the image x.
        text: y_l^t on x.
        noise: y_l^n on x^n, the policy's most likely tokens there; the reference scores the policy's tokens (Eq. 5).
        noise_on_clean: y_l^n on x; policy and reference each score their own most likely tokens under x^n (released
            code).
        preferred_on_distorted: y_w on x^n.
    """

    preferred: Tensor | None = None
    text: Tensor | None = None
    noise: Tensor | None = None
    noise_on_clean: Tensor | None = None
    preferred_on_distorted: Tensor | None = None


ON_DISTORTED = frozenset({"noise", "noise_on_clean", "preferred_on_distorted"})  # terms that need x^n
DISPREFERENCES = {"text": "text", **dict.fromkeys(ON_DISTORTED, "noise")}  # what an ablation must allow for a term


class Outcome(NamedTuple):
    """Losses [B] and named implicit rewards, each [B] and weighted as it stands inside the loss."""

    loss_B: Tensor
    rewards: dict[str, Tensor]


class Objective(ABC):
    """What one stage of training minimises.

    Attributes:
        needs: names of the :class:`Terms` to be scored.
        optional: those of ``needs`` that an ablation may leave out; they are ``None`` then.
        reference: whether the reference must be scored; without it no reference forward runs and ``__call__`` is given
            ``None``.
    """

    needs: ClassVar[frozenset[str]]
    optional: ClassVar[frozenset[str]] = frozenset()
    reference: ClassVar[bool] = True

    @abstractmethod
    def __call__(self, policy: Terms, reference: Terms, tokens: Terms) -> Outcome:
        """Losses and rewards of a batch.

        Args:
            policy, reference: log-probabilities [B] of the terms in use.
            tokens: the number of tokens of each response [B], or the sum of their weights.
        """

    @property
    def scale(self) -> float:
        """What log pi/ref is multiplied by in logged rewards, for all responses and stages alike: DPO's beta."""
        return 1.0

    # A method ``token_weights(preferred, dispreferred)`` weights tokens: it takes the token ids of the two responses
    # and returns a weight for each, as two lists; log-probabilities are then weighted sums.
    token_weights = None

    def terms(self, dispreferences: Set[str]) -> frozenset[str]:
        """What is scored in a stage that may use these ``dispreferences`` (of "text" and "noise").

        Raises:
            ValueError: the objective cannot do without a term that they leave out.
        """
        kept = frozenset(t for t in self.needs if DISPREFERENCES.get(t, "") in {"", *dispreferences})
        missing = self.needs - kept - self.optional
        if missing:
            raise ValueError(
                f"{type(self).__name__} needs {' and '.join(sorted({DISPREFERENCES[t] for t in missing}))} "
                f"dispreferences, and this stage has {' and '.join(sorted(dispreferences)) or 'none'}"
            )
        return kept
