"""A picture with random patches missing."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field, validate_call
from torch import Tensor

from povid.method.distortions import Distortion


class PatchMask(Distortion):
    """x^n is x with random patches of a grid in x's mean color.

    OPA-DPO masks 30 % of its images so (arXiv 2501.09695; ``mask_single_image`` of its dpo_trainer.py, blockwise).

    Args:
        share: of the patches that are masked, more than 0 and at most 1; at least one patch is.
        grid: patches along each side, at least 1; LLaVA-1.5 sees 24 times 24.
    """

    space = "pixel"

    @validate_call
    def __init__(
        self, share: Annotated[float, Field(gt=0, le=1)] = 0.3, grid: Annotated[int, Field(ge=1)] = 24
    ) -> None:
        self.share, self.grid = share, grid

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """[3, H, W] to the same shape; sides shorter than the grid have patches of one pixel."""
        rows, columns = (min(self.grid, side) for side in x.shape[1:])
        masked = torch.zeros(rows * columns, dtype=torch.bool)
        count = max(1, round(self.share * rows * columns))
        masked[torch.randperm(rows * columns, generator=generator)[:count]] = True
        row_H, column_W = (torch.arange(side) * patches // side for side, patches in zip(x.shape[1:], (rows, columns)))
        mask_HW = masked.reshape(rows, columns)[row_H][:, column_W]
        return torch.where(mask_HW, x.mean((1, 2), keepdim=True), x)
