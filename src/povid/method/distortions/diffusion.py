"""Forward diffusion (paper, Eq. 4 and appendix A.1) by any diffusers scheduler that adds noise."""

from __future__ import annotations

from typing import Annotated, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor

from povid.method.distortions import Distortion


class Scheduler(Protocol):
    """What is used of a diffusers scheduler."""

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor: ...


class Diffusion(Distortion):
    """x(k) = sqrt(xi_bar_k) x + sqrt(1 - xi_bar_k) eps (Eq. 4), eps standard normal.

    Appendix A.1's schedule is ``diffusers.DDPMScheduler(beta_schedule="sigmoid", beta_start=1e-5, beta_end=5e-3)``. Its
    formula gives the betas: read literally as the xi of Eq. 4 it would erase the picture, and the released code takes
    it as beta too.

    Args:
        scheduler: adds the noise; any object with diffusers' ``add_noise(x, eps, timesteps)``.
        step: k, at least 0 and below the scheduler's ``num_train_timesteps`` (1000); the paper uses 500 (Table 5).
        space: where the noise is added, see :mod:`povid.method.distortions`.
        wrap_around: convert a noised picture to 8 bits as the released code does on x86: 255 x is truncated towards
            zero and taken modulo 256, so that values outside [0, 1] return at the other end. Needs ``space=pixel``.

    Raises:
        ValueError: a step that the scheduler does not have, betas outside [0, 1), or wrap-around outside pixel space.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        step: Annotated[int, Field(ge=0)] = 500,
        space: Literal["normalized", "pixel"] = "normalized",
        wrap_around: bool = False,
    ) -> None:
        steps = getattr(getattr(scheduler, "config", None), "num_train_timesteps", 1000)
        if step >= steps:
            raise ValueError(f"step: found {step}; the scheduler has steps 0 to {steps - 1}")
        betas = getattr(scheduler, "betas", None)
        if betas is not None and not ((betas >= 0) & (betas < 1)).all():
            raise ValueError("scheduler: its betas must be at least 0 and less than 1; correct beta_start and beta_end")
        if wrap_around and space != "pixel":
            raise ValueError("wrap_around: the released code's 8-bit wrap-around needs space=pixel")
        self.scheduler, self.step, self.space, self.wrap_around = scheduler, step, space, wrap_around

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        eps = torch.randn(x.shape, generator=generator)
        return self.scheduler.add_noise(x[None], eps[None], torch.tensor([self.step]))[0]

    def to_bytes(self, x: Tensor) -> Tensor:
        if self.wrap_around:
            return (x * 255).to(torch.int32).bitwise_and(255).to(torch.uint8)
        return super().to_bytes(x)
