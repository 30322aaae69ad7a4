"""Log-probabilities of a batch's responses under policy and reference.

The exact algorithm: vision once for both models, preferred and text-dispreferred packed behind their shared prefix,
logits only where a response token is predicted, and one forward of the noised image for choosing and scoring y_l^n.
Shape suffixes: B = examples, U = predicting positions, N = response tokens of a side, V = vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from povid.method.objective import LogProbs, most_likely, token_logps
from povid.model.packing import Side
from povid.model.policy import Policy
from povid.training.datamodule import PreferenceBatch


def sum_logps(logits_UV: Tensor, side: Side, examples: int) -> Tensor:
    """log pi(y|x): sum over the response's tokens, [B]."""
    return _sum(token_logps(logits_UV[side.position_N], side.token_N), side, examples)


def _sum(logps_N: Tensor, side: Side, examples: int) -> Tensor:
    return logps_N.new_zeros(examples).index_add(0, side.example_N, logps_N)


def score(
    policy: Policy,
    batch: PreferenceBatch,
    *,
    noise_on_clean_image: bool = False,
    noise_tokens_N: Tensor | None = None,
    known_reference: LogProbs | None = None,
) -> tuple[LogProbs, LogProbs]:
    """Log-probabilities [B] under the policy (with gradient) and the reference (without).

    The batch decides which terms there are. The noise term is, by default, the paper's (Eq. 5): the policy's own most
    likely tokens y_l^n given x^n and the preferred prefix, scored on x^n by both. With ``noise_on_clean_image`` it is
    the released code's: policy and reference each take their own most likely tokens under x^n and score them on the
    clean image. ``noise_tokens_N`` pins y_l^n (for comparisons, since near ties flip). ``known_reference`` holds the
    reference's log-probabilities of the pairs and saves its forward; the released noise term reads its logits and
    cannot do without.
    """
    if known_reference is not None and noise_on_clean_image and batch.noised is not None:
        raise ValueError("the released noise term needs the reference's logits on the clean image")
    seen = policy.look(batch.images)
    noised = None if batch.noised is None else policy.look(batch.noised)
    with policy.reference():  # before the policy, whose activations would be in memory meanwhile
        theirs, reference_UV = (known_reference, None) if known_reference else _pairs(policy, batch, seen)
        reference_noised_UV = None if noised is None else policy.predict(batch.preferred, noised)
    if noise_on_clean_image and noised is not None:
        with torch.no_grad():
            noised_UV = policy.predict(batch.preferred, noised)
    ours, logits_UV = _pairs(policy, batch, seen)
    if noised is None:
        return ours, theirs
    if not noise_on_clean_image:
        noised_UV = policy.predict(batch.preferred, noised)

    side, clean, examples = batch.preferred.preferred, batch.pairs.preferred, batch.pairs.examples
    tokens_N = most_likely(noised_UV)[side.position_N] if noise_tokens_N is None else noise_tokens_N
    if noise_on_clean_image:
        own = noise_tokens_N is None
        reference_tokens_N = most_likely(reference_noised_UV)[side.position_N] if own else noise_tokens_N
        side, noised_UV, reference_noised_UV = clean, logits_UV, reference_UV
    else:
        reference_tokens_N = tokens_N
    return (
        ours._replace(noise=_sum(token_logps(noised_UV[side.position_N], tokens_N), side, examples)),
        theirs._replace(
            noise=_sum(token_logps(reference_noised_UV[side.position_N], reference_tokens_N), side, examples)
        ),
    )


def _pairs(policy: Policy, batch: PreferenceBatch, seen: Any) -> tuple[LogProbs, Tensor]:
    """Log-probabilities of y_w and y_l^t, and the logits [U, V] from which y_w was read."""
    logits_UV = policy.predict(batch.pairs, seen)
    preferred = sum_logps(logits_UV, batch.pairs.preferred, batch.pairs.examples)
    if batch.pairs.dispreferred is not None:
        return LogProbs(preferred, sum_logps(logits_UV, batch.pairs.dispreferred, batch.pairs.examples)), logits_UV
    if batch.dispreferred is not None:  # a model whose sequences cannot be packed
        apart_UV = policy.predict(batch.dispreferred, seen)
        return LogProbs(preferred, sum_logps(apart_UV, batch.dispreferred.preferred, batch.pairs.examples)), logits_UV
    return LogProbs(preferred), logits_UV
