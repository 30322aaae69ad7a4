"""Objectives: pure functions of log-probabilities, one file each.

An objective names what must be scored (``needs``, fields of :class:`Terms`) and turns scores into a loss; scoring finds
the fewest passes. y_w is the preferred response, y_l^t the text dispreferred one, y_l^n what the policy itself would
say of the distorted image x^n. Shape suffix: B = examples of a batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence, Set
from typing import NamedTuple

import torch
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

    @property
    def dispreferred(self) -> dict[str, Tensor]:
        """The dispreferred responses that are scored where they were seen: y_l^t ("text") and y_l^n ("noise")."""
        pairs = {"text": self.text, "noise": self.noise}
        return {name: scored_B for name, scored_B in pairs.items() if scored_B is not None}


ON_DISTORTED = frozenset({"noise", "noise_on_clean", "preferred_on_distorted"})  # terms that need x^n
DISPREFERENCES = {"text": "text", **dict.fromkeys(ON_DISTORTED, "noise")}  # what an ablation must allow for a term


Weigh = Callable[[Sequence[int], Sequence[int]], tuple[Sequence[float], Sequence[float]]]
"""Takes the token ids of a preferred and a dispreferred response and returns a weight for each token of both."""


class Outcome(NamedTuple):
    """Losses [B] and named implicit rewards, each [B] and weighted as it stands inside the loss."""

    loss_B: Tensor
    rewards: dict[str, Tensor]


def mean_of_pairs(losses: Sequence[Tensor]) -> Tensor:
    """The mean [B] of the losses [B] of several pairs of a preferred and a dispreferred response."""
    return torch.stack(list(losses)).mean(0)


class Objective(ABC):
    """What one stage of training minimises.

    Attributes:
        needs: names of the :class:`Terms` to be scored.
        optional: those of ``needs`` that an ablation may leave out; they are ``None`` then. If it leaves out every
            dispreference among them, nothing is left to prefer to, and the stage is refused.
        reference: whether the reference must be scored; without it no reference forward runs and ``__call__`` is given
            ``None``.
        distorted_images: 1: policy and reference see the same x^n; 2: each sees one of its own, drawn separately.
        differing_only: whether y_l^n counts only at positions where it is not y_w's token. The number of its tokens in
            ``tokens`` stays that of y_w.
        token_weights: a method that weights tokens; None: log-probabilities are plain sums, not weighted ones. y_l^n
            takes the weights of y_w's tokens in its positions.

    A setting may be a field of the same name, as ``differing_only`` is of :class:`povid.method.objectives.povid.POVID`.
    """

    needs: frozenset[str]
    optional: frozenset[str] = frozenset()
    reference: bool = True
    distorted_images: int = 1
    differing_only: bool = False
    token_weights: Weigh | None = None

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

    def terms(self, dispreferences: Set[str]) -> frozenset[str]:
        """What is scored in a stage that may use these ``dispreferences`` (of "text" and "noise").

        Raises:
            ValueError: the objective cannot do without a term that they leave out.
        """
        kept = frozenset(t for t in self.needs if DISPREFERENCES.get(t, "") in {"", *dispreferences})
        missing, joined = self.needs - kept - self.optional, " and "
        if not missing and self.optional and not kept & DISPREFERENCES.keys():
            missing, joined = self.optional, " or "
        if missing:
            raise ValueError(
                f"{type(self).__name__} needs {joined.join(sorted({DISPREFERENCES[t] for t in missing}))} "
                f"dispreferences, and this stage has {' and '.join(sorted(dispreferences)) or 'none'}"
            )
        return kept
