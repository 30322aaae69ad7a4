"""Dense DPO: tokens in which the two responses differ weigh more than those that they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Annotated

from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from povid.method.objectives import Objective, Outcome, Terms, mean_of_pairs

Span = tuple[int, int]


@dataclass(frozen=True)
class DDPO(Objective):
    """-log sigmoid(beta r(y_w) - beta r(y_l)), r = log pi/ref summed with ``weight`` on tokens of changed segments.

    y_l is y_l^t. A stage that also has y_l^n takes the mean of both pairs; y_l^n has the weights of y_w's tokens in
    its positions. Changed is what no matching block of difflib holds.
    Sources: RLHF-V (arXiv 2312.00849, section 3.2) and RLHF-V/RLAIF-V, muffin/train/trainers.py
    (``compute_weighted_logp``) and utils/diff_lib.py, whose segments are ``shortest_match=3 one_sided=false``.

    Args:
        beta: strength of the Kullback-Leibler constraint, more than 0.
        weight: of a token in a changed segment, more than 0; all others weigh 1. The sources use 3 and 5.
        mean: take weighted means instead of weighted sums, as RLHF-V's paper does.
        shortest_match: matching blocks of fewer tokens, at least 1, count as changed.
        one_sided: whether a segment that the other response lacks, rather than words otherwise, counts as changed.
    """

    needs = frozenset({"preferred", "text", "noise"})
    optional = frozenset({"noise"})

    beta: Annotated[float, Field(gt=0)] = 0.1
    weight: Annotated[float, Field(gt=0)] = 3.0
    mean: bool = False
    shortest_match: Annotated[int, Field(ge=1)] = 1
    one_sided: bool = True

    @property
    def scale(self) -> float:
        return self.beta

    def __call__(self, policy: Terms, reference: Terms, tokens: Terms) -> Outcome:
        def reward(name: str) -> Tensor:
            ratio_B = self.beta * (getattr(policy, name) - getattr(reference, name))
            return ratio_B / getattr(tokens, name) if self.mean else ratio_B

        rewards = {name: reward(name) for name in ("preferred", *policy.dispreferred)}
        losses = [-logsigmoid(rewards["preferred"] - rewards[name]) for name in policy.dispreferred]
        return Outcome(mean_of_pairs(losses), rewards)

    def token_weights(self, preferred: Sequence[int], dispreferred: Sequence[int]) -> tuple[list[float], list[float]]:
        """The weight of each token of y_w and of y_l^t."""
        weights = [1.0] * len(preferred), [1.0] * len(dispreferred)
        for spans in self._changed(preferred, dispreferred):
            for side, (start, end) in zip(weights, spans):
                side[start:end] = [self.weight] * (end - start)
        return weights

    def _changed(self, preferred: Sequence[int], dispreferred: Sequence[int]) -> list[tuple[Span, Span]]:
        """(start, end) in both responses of every changed segment."""
        matcher = SequenceMatcher(None, preferred, dispreferred, autojunk=False)
        *blocks, end = matcher.get_matching_blocks()
        found, at = [], (0, 0)
        for block in [*(block for block in blocks if block.size >= self.shortest_match), end]:
            spans = (at[0], block.a), (at[1], block.b)
            if self.one_sided or all(start < stop for start, stop in spans):
                found.append(spans)
            at = block.a + block.size, block.b + block.size
        return found
