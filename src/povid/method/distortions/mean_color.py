"""No picture left but its color: what a model says then comes from the text alone."""

from __future__ import annotations

import torch
from torch import Tensor

from povid.method.distortions import Distortion


class MeanColor(Distortion):
    """x^n is the mean color of x everywhere; nothing is random and nothing can be set."""

    space = "pixel"

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """[3, H, W] to the same shape."""
        return x.mean((1, 2), keepdim=True).expand_as(x)
