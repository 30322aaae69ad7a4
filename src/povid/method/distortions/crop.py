"""A random part of the picture, enlarged: much of what a response speaks of lies outside it."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field, validate_call
from torch import Tensor

from povid.method.distortions import Distortion

Share = Annotated[float, Field(gt=0, le=1)]


class Crop(Distortion):
    """x^n is a random part of x with x's proportions.

    The default areas are those of mDPO's rejected images (arXiv 2406.11839; its code's ``crop_images``).

    Args:
        smallest, largest: bounds of the area that is kept, as a share of x's, more than 0 and at most 1. The area is
            drawn uniformly between them.

    Raises:
        ValueError: ``smallest`` is more than ``largest``.
    """

    space = "pixel"

    @validate_call
    def __init__(self, smallest: Share = 0.01, largest: Share = 0.2) -> None:
        if smallest > largest:
            raise ValueError(f"smallest: found {smallest}, needed at most largest, which is {largest}")
        self.smallest, self.largest = smallest, largest

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """[3, H, W] to [3, H', W']."""
        share, down, across = torch.rand(3, generator=generator).tolist()
        scale = (self.smallest + share * (self.largest - self.smallest)) ** 0.5
        height, width = (max(1, round(scale * side)) for side in x.shape[1:])
        top, left = int(down * (x.shape[1] - height + 1)), int(across * (x.shape[2] - width + 1))
        return x[:, top : top + height, left : left + width]
