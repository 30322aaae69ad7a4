"""y_l^n, the response that a distorted image triggers (paper, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor


def most_likely(logits_NV: Tensor) -> Tensor:
    """y_l^n given x^n and the preferred prefix: at each response position the most likely token [N].

    No gradient flows through the choice. Shape suffixes: N = response tokens, V = vocabulary.
    """
    with torch.no_grad():
        return logits_NV.argmax(dim=-1)
