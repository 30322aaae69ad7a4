"""The objectives of POVID: pure functions of log-probabilities.

Every argument is a sum of log-probabilities over a response's tokens (end token included, prompt and image excluded).
Shape suffix: B = examples of a batch. ``w`` = preferred, ``t`` = text dispreferred, ``n`` = noise dispreferred.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


class LogProbs(NamedTuple):
    """log pi(y|x) of the responses of a batch, each of shape [B]; ``None`` where the ablation does not use one.

    ``noise`` is log pi(y_l^n | x^n) under the paper's objective; under the released one it is scored on x.
    """

    preferred: Tensor
    text: Tensor | None = None
    noise: Tensor | None = None


class Objective(NamedTuple):
    """Loss [B] and the implicit rewards [B], each weighted as it stands inside the loss."""

    loss_B: Tensor
    reward_preferred_B: Tensor
    reward_text_B: Tensor | None
    reward_noise_B: Tensor | None


def text_dispreference(policy: LogProbs, reference: LogProbs, *, alpha: float) -> Objective:
    """Stage 1: DPO between the preferred and the text-dispreferred response (paper, Eq. 3).

    Args:
        policy, reference: log-probabilities with ``preferred`` and ``text``, each [B].
        alpha: strength of the Kullback-Leibler constraint, > 0.
    """
    reward_w = alpha * (policy.preferred - reference.preferred)
    reward_t = alpha * (policy.text - reference.text)
    return Objective(-logsigmoid(reward_w - reward_t), reward_w, reward_t, None)  # Eq. 3


def povid(policy: LogProbs, reference: LogProbs, *, alpha: float, beta_text: float, beta_noise: float) -> Objective:
    """Stage 2 as the paper prints it: one sigmoid over all three responses (paper, Eq. 5).

    Args:
        policy, reference: log-probabilities [B]; ``noise`` scored on the noised image. A term whose log-probabilities
            are ``None`` is left out, which is Eq. 5 with that coefficient zero (ablation "noise": beta_1 = 0).
        alpha: coefficient of the preferred response; beta_text, beta_noise: beta_1 and beta_2 of Eq. 5, >= 0.
    """
    reward_w = alpha * (policy.preferred - reference.preferred)
    reward_t = None if policy.text is None else beta_text * (policy.text - reference.text)
    reward_n = None if policy.noise is None else beta_noise * (policy.noise - reference.noise)
    dispreferred = sum(reward for reward in (reward_t, reward_n) if reward is not None)
    return Objective(-logsigmoid(reward_w - dispreferred), reward_w, reward_t, reward_n)  # Eq. 5


def released(
    policy: LogProbs, reference: LogProbs, *, beta: float, weight_text: float, weight_noise: float
) -> Objective:
    """Stage 2 as the released code computes it: the weighted mean of two DPO losses.

    The pairs are (y_w, y_l^t) and (y_w, y_l^n); the released trainer weighs each by one half. When the ablation lacks
    one of the two the other stands alone (weights are divided by their sum).

    Source: YiyangZhou/POVID, tool/dpo_trainer_inherent.py. Log-probabilities [B]; beta > 0; weights >= 0.
    """
    reward_w = beta * (policy.preferred - reference.preferred)
    pairs = [
        (weight, beta * (dispreferred - reference_dispreferred))
        for weight, dispreferred, reference_dispreferred in (
            (weight_text, policy.text, reference.text),
            (weight_noise, policy.noise, reference.noise),
        )
        if dispreferred is not None
    ]
    total = sum(weight for weight, _ in pairs)
    loss_B = sum(weight / total * -logsigmoid(reward_w - reward_l) for weight, reward_l in pairs)
    rewards = iter(reward for _, reward in pairs)
    return Objective(
        loss_B,
        reward_w,
        None if policy.text is None else next(rewards),
        None if policy.noise is None else next(rewards),
    )


def preferred_only(policy: LogProbs, reference: LogProbs, *, tokens_B: Tensor) -> Objective:
    """The control that is only fine-tuned: negative log-likelihood of y_w per token.

    Args:
        policy, reference: log-probabilities with ``preferred`` [B]; the reference is used for the reward alone.
        tokens_B: number of tokens of each preferred response.
    """
    return Objective(-policy.preferred / tokens_B, policy.preferred - reference.preferred, None, None)


def most_likely(logits_NV: Tensor) -> Tensor:
    """y_l^n of section 3.2: at each position the most likely token; no gradient flows through the choice. [N]"""
    with torch.no_grad():
        return logits_NV.argmax(dim=-1)


def token_logps(logits_NV: Tensor, tokens_N: Tensor) -> Tensor:
    """log-softmax in float32 (float64 stays) of logits [N, V], read at tokens [N] -> [N]."""
    logits_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    picked_N = logits_NV.gather(-1, tokens_N[:, None])[:, 0]
    return picked_N - logits_NV.logsumexp(-1)
