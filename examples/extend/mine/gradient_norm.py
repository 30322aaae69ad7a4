"""A callback: the norm of the gradient, beside the loss in metrics.csv and in every logger."""

from __future__ import annotations

from typing import Annotated

import lightning as L
import torch
from pydantic import Field


class GradientNorm(L.Callback):
    """Logs ``train/gradient_norm`` once an optimizer step, before the gradient is clipped.

    The norm is that of all gradients taken as one vector, on one device or several (DDP, FSDP2).

    Args:
        order: p of the p-norm, more than 0.
    """

    def __init__(self, order: Annotated[float, Field(gt=0)] = 2.0) -> None:
        self.order = order

    def on_before_optimizer_step(
        self, trainer: L.Trainer, module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        module.log("train/gradient_norm", torch.nn.utils.get_total_norm(gradients, self.order))
