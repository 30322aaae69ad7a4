"""The picture without its details."""

from __future__ import annotations

from typing import Annotated

import torch
from PIL import ImageFilter
from pydantic import Field, validate_call
from torch import Tensor

from povid.method.distortions import Distortion, to_picture, to_tensor


class Blur(Distortion):
    """x^n is x after a Gaussian blur; nothing is random.

    Args:
        sigma: standard deviation as a share of the longer side, more than 0 and at most 1, so that it means the same
            for pictures of all sizes. 0.03 is 10 of LLaVA-1.5's 336 pixels.
    """

    space = "pixel"

    @validate_call
    def __init__(self, sigma: Annotated[float, Field(gt=0, le=1)] = 0.03) -> None:
        self.sigma = sigma

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """[3, H, W] to the same shape, in 8-bit steps."""
        blur = ImageFilter.GaussianBlur(self.sigma * max(x.shape[1:]))
        return to_tensor(to_picture(self.to_bytes(x)).filter(blur))
