"""Log-probabilities of a batch's responses under policy and reference, with as few passes as possible.

The vision tower runs once for both models, preferred and text-dispreferred responses are packed behind their shared
prefix, logits are computed only where a response token is predicted, and all terms on the distorted image share one
forward pass. Shape suffixes:
B = examples, U = predicting positions, N = response tokens of a side, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import torch
from torch import Tensor

from povid.method.noise_dispreferred import most_likely
from povid.method.objectives import ON_DISTORTED, Terms
from povid.model.packing import Side
from povid.model.policy import Policy
from povid.training.datamodule import PreferenceBatch

GRADIENT_ON_DISTORTED = frozenset({"noise", "preferred_on_distorted"})


def token_logps(logits_NV: Tensor, tokens_N: Tensor) -> Tensor:
    """Log-probabilities [N] of tokens [N] under logits [N, V], computed in float32 (float64 for float64 logits)."""
    logits_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    picked_N = logits_NV.gather(-1, tokens_N[:, None])[:, 0]
    return picked_N - logits_NV.logsumexp(-1)


def sum_logps(
    logits_UV: Tensor, side: Side, examples: int, tokens_N: Tensor | None = None, *, differing_only: bool = False
) -> Tensor:
    """log pi(y|x) [B]: the (weighted) sum over a side's response tokens, or over other tokens in their places.

    ``differing_only``: over those of the other tokens that are not the side's own.
    """
    logps_N = token_logps(logits_UV[side.position_N], side.token_N if tokens_N is None else tokens_N)
    if side.weight_N is not None:
        logps_N = logps_N * side.weight_N
    if differing_only and tokens_N is not None:
        logps_N = logps_N * (tokens_N != side.token_N)
    return logps_N.new_zeros(examples).index_add(0, side.example_N, logps_N)


def first_token(logits_UV: Tensor, side: Side, examples: int) -> Tensor:
    """P [B] of a side's first response token; 0 for an example without response tokens."""
    if not len(side.example_N):
        return logits_UV.new_zeros(examples)
    example_B = torch.arange(examples, device=side.example_N.device)
    first_B = torch.searchsorted(side.example_N, example_B).clamp(max=len(side.example_N) - 1)
    logps_B = token_logps(logits_UV[side.position_N[first_B]], side.token_N[first_B])
    return logps_B.exp() * (side.example_N[first_B] == example_B)


def differing(chosen_N: Tensor, side: Side, examples: int) -> Tensor:
    """Share [B] of a side's response tokens in whose places others were chosen."""
    counted_B = torch.zeros(2, examples, device=chosen_N.device)
    counted_B.index_add_(1, side.example_N, torch.stack([chosen_N != side.token_N, chosen_N == chosen_N]).float())
    return counted_B[0] / counted_B[1].clamp(min=1)


def score(
    policy: Policy,
    batch: PreferenceBatch,
    terms: Set[str],
    *,
    with_reference: bool = True,
    noise_tokens_N: Tensor | None = None,
    known_reference: Terms | None = None,
    differing_only: bool = False,
    observed: dict[str, Tensor] | None = None,
) -> tuple[Terms, Terms | None]:
    """Score ``terms`` under the policy (with gradient) and the reference (without).

    Args:
        batch: made for these terms (:func:`povid.training.datamodule.collate`).
        terms: names of :class:`povid.method.objectives.Terms`.
        with_reference: whether to score the reference; if not, None is returned for it and it is never run.
        noise_tokens_N: fixes y_l^n, for comparisons of implementations, in which near ties could fall either way.
        known_reference: the reference log-probabilities of the responses on the clean image, which saves that pass.
        differing_only: leave out of y_l^n the positions where it is y_w's token.
        observed: receives what is seen by the way, each [B] and without gradient: ``p_first_token``, the policy's P
            of y_w's first token on x, and ``noise_differs``, the share of tokens in which y_l^n differs from y_w.

    Raises:
        ValueError: ``known_reference`` with ``noise_on_clean``, which reads the reference's logits.
    """
    if known_reference is not None and "noise_on_clean" in terms:
        raise ValueError("noise_on_clean needs the reference's logits on the clean image")
    distorted, gradient = bool(ON_DISTORTED & terms), bool(GRADIENT_ON_DISTORTED & terms)
    seen = policy.look(batch.images)
    seen_distorted = policy.look(batch.noised) if distorted else None
    seen_by_reference = seen_distorted
    if with_reference and batch.noised_for_reference is not None:
        seen_by_reference = policy.look(batch.noised_for_reference)
    reference, reference_UV, reference_distorted_UV = known_reference, None, None
    if with_reference:
        with policy.reference():  # first, while no activations of the policy are in memory
            if reference is None:
                reference, reference_UV = _clean(policy, batch, seen)
            if distorted:
                reference_distorted_UV = policy.predict(batch.preferred, seen_by_reference)
    if distorted and not gradient:
        with torch.no_grad():
            distorted_UV = policy.predict(batch.preferred, seen_distorted)
    scored, clean_UV = _clean(policy, batch, seen)
    side, examples = batch.pairs.preferred, batch.pairs.examples
    if observed is not None:
        with torch.no_grad():
            observed["p_first_token"] = first_token(clean_UV, side, examples)
    if not distorted:
        return scored, reference
    if gradient:
        distorted_UV = policy.predict(batch.preferred, seen_distorted)

    side, clean, examples = batch.preferred.preferred, batch.pairs.preferred, batch.pairs.examples
    found, found_reference = {}, {}
    chosen_N = most_likely(distorted_UV)[side.position_N] if noise_tokens_N is None else noise_tokens_N
    if observed is not None and terms & {"noise", "noise_on_clean"}:
        observed["noise_differs"] = differing(chosen_N, side, examples)
    if "noise" in terms:
        found["noise"] = sum_logps(distorted_UV, side, examples, chosen_N, differing_only=differing_only)
        if with_reference:  # the policy's tokens
            found_reference["noise"] = sum_logps(
                reference_distorted_UV, side, examples, chosen_N, differing_only=differing_only
            )
    if "noise_on_clean" in terms:
        found["noise_on_clean"] = sum_logps(clean_UV, clean, examples, chosen_N, differing_only=differing_only)
        if with_reference:  # its own tokens
            own_N = noise_tokens_N
            if own_N is None:
                own_N = most_likely(reference_distorted_UV)[side.position_N]
            found_reference["noise_on_clean"] = sum_logps(
                reference_UV, clean, examples, own_N, differing_only=differing_only
            )
    if "preferred_on_distorted" in terms:
        found["preferred_on_distorted"] = sum_logps(distorted_UV, side, examples)
        if with_reference:
            found_reference["preferred_on_distorted"] = sum_logps(reference_distorted_UV, side, examples)
    return scored._replace(**found), reference._replace(**found_reference) if with_reference else None


def _clean(policy: Policy, batch: PreferenceBatch, seen: Any) -> tuple[Terms, Tensor]:
    """Log-probabilities of y_w and y_l^t on x, and the logits [U, V] from which y_w was read."""
    logits_UV = policy.predict(batch.pairs, seen)
    scored = Terms(sum_logps(logits_UV, batch.pairs.preferred, batch.pairs.examples))
    if batch.pairs.dispreferred is not None:
        text = sum_logps(logits_UV, batch.pairs.dispreferred, batch.pairs.examples)
        return scored._replace(text=text), logits_UV
    if batch.dispreferred is not None:  # a model whose sequences cannot be packed
        apart_UV = policy.predict(batch.dispreferred, seen)
        text = sum_logps(apart_UV, batch.dispreferred.preferred, batch.pairs.examples)
        return scored._replace(text=text), logits_UV
    return scored, logits_UV
