"""Forward diffusion (paper, Eq. 4 and appendix A.1) by any diffusers scheduler that adds noise to pictures."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field, validate_call
from torch import Tensor

from povid.method.distortions import Distortion


class Diffusion(Distortion):
    """x(k) = sqrt(xi_bar_k) x + sqrt(1 - xi_bar_k) eps (Eq. 4), eps standard normal.

    Appendix A.1's schedule is ``diffusers.DDPMScheduler(beta_schedule="sigmoid", beta_start=1e-5, beta_end=5e-3)``. Its
    formula gives the betas: read literally as the xi of Eq. 4 it would erase the picture, and the released code takes
    it as beta too.

    Schedulers that leave x whole and add noise of growing variance (Euler, Heun, LMS, ...) have their sum scaled to
    unit variance, which makes it Eq. 4 with the same ratio of picture to noise; a diffusion model scales it so too.
    Schedulers of flow matching mix as they do: (1 - sigma_k) x + sigma_k eps.

    Args:
        scheduler: adds the noise; any object with diffusers' ``add_noise(x, eps, timesteps)``, or with
            ``scale_noise(x, timesteps, eps)`` as those of flow matching have it. A scheduler whose timesteps are not
            numbered 0 to ``num_train_timesteps`` is asked for the noise level at the same place among its own.
        step: k, at least 0 and below the scheduler's ``num_train_timesteps`` (1000); the paper uses 500 (Table 5).
        space: where the noise is added, see :mod:`povid.method.distortions`.
        wrap_around: convert a noised picture to 8 bits as the released code does on x86: 255 x is truncated towards
            zero and taken modulo 256, so that values outside [0, 1] return at the other end. Needs ``space=pixel``.

    Raises:
        ValueError: a step that the scheduler does not have, betas outside [0, 1), a scheduler that cannot noise a
            picture, or wrap-around outside pixel space.
    """

    @validate_call
    def __init__(
        self,
        scheduler: Any,
        step: Annotated[int, Field(ge=0)] = 500,
        space: Literal["normalized", "pixel"] = "normalized",
        wrap_around: bool = False,
    ) -> None:
        steps = getattr(getattr(scheduler, "config", None), "num_train_timesteps", None) or 1000
        if not 0 <= step < steps:
            raise ValueError(f"step: found {step}; the scheduler has steps 0 to {steps - 1}")
        betas = getattr(scheduler, "betas", None)
        if betas is not None and not ((betas >= 0) & (betas < 1)).all():
            raise ValueError("scheduler: its betas must be at least 0 and less than 1; correct beta_start and beta_end")
        if wrap_around and space != "pixel":
            raise ValueError("wrap_around: the released code's 8-bit wrap-around needs space=pixel")
        self.scheduler, self.step, self.space, self.wrap_around = scheduler, step, space, wrap_around
        try:
            levels = _levels(scheduler, steps)
            self.level = levels[step : step + 1]
            keeps, adds = self._factors(self.level)
            grows = self._factors(levels[:1])[1] < self._factors(levels[-1:])[1]
        except Exception as error:  # whatever a scheduler for something else makes of a picture
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(
                f"scheduler: {type(scheduler).__name__} cannot add noise to a picture ({reason}); choose one that can, "
                "such as diffusers.DDPMScheduler"
            ) from None
        if not grows:
            raise ValueError(f"scheduler: the noise of {type(scheduler).__name__} does not grow with its steps")
        self.scale = (1 + adds**2) ** -0.5 if keeps == 1 and adds > 0 else None

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        noised = self._mix(x, torch.randn(x.shape, generator=generator), self.level)
        return noised if self.scale is None else noised * self.scale

    def to_bytes(self, x: Tensor) -> Tensor:
        if self.wrap_around:
            return (x * 255).to(torch.int32).bitwise_and(255).to(torch.uint8)
        return super().to_bytes(x)

    def _mix(self, x: Tensor, eps: Tensor, level: Tensor) -> Tensor:
        if hasattr(self.scheduler, "add_noise"):
            return self.scheduler.add_noise(x[None], eps[None], level)[0]
        return self.scheduler.scale_noise(x[None], level, eps[None])[0]

    def _factors(self, level: Tensor) -> tuple[float, float]:
        """What x and eps are multiplied with at a noise level."""
        one, zero = torch.ones(3, 1, 1), torch.zeros(3, 1, 1)
        return float(self._mix(one, zero, level)[0]), float(self._mix(zero, one, level)[0])


def _levels(scheduler: Any, steps: int) -> Tensor:
    """The scheduler's own timestep [1] for each of ``steps``, from the cleanest picture to pure noise."""
    if hasattr(scheduler, "alphas_cumprod") and not hasattr(scheduler, "sigmas"):
        return torch.arange(steps)  # add_noise reads alphas_cumprod by step
    if not hasattr(scheduler, "set_timesteps"):
        return torch.arange(steps)
    scheduler.set_timesteps(steps)  # several add the wrong level's noise before this call
    own = torch.as_tensor(scheduler.timesteps).unique()  # sorted
    if abs(float(own[-1]) - steps) <= 1:  # numbered as the steps are: the nearest one
        nearest = (own.double()[None] - torch.arange(steps).double()[:, None]).abs().argmin(1)
        return own[nearest]
    return own[torch.linspace(0, len(own) - 1, steps).round().long()]
