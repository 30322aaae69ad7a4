"""A distortion: the picture cut into tiles that change places."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field, validate_call
from torch import Tensor

from povid.method.distortions import Distortion


class Tiles(Distortion):
    """x^n is x with its tiles in random order: what is in the picture stays visible, where it is does not.

    Args:
        side: tiles along each side, at least 1, which leaves x as it is. Pixels that do not fill a tile stay in place.
    """

    space = "pixel"

    @validate_call
    def __init__(self, side: Annotated[int, Field(ge=1)] = 3) -> None:
        self.side = side

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """[3, H, W] to the same shape."""
        n = self.side
        height, width = x.shape[1] // n, x.shape[2] // n
        whole = x[:, : n * height, : n * width].reshape(3, n, height, n, width).transpose(2, 3).flatten(1, 2)
        mixed = whole[:, torch.randperm(n * n, generator=generator)]
        result = x.clone()
        tiles = mixed.unflatten(1, (n, n)).transpose(2, 3)
        result[:, : n * height, : n * width] = tiles.reshape(3, n * height, n * width)
        return result
