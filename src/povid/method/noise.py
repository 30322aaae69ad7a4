"""Image distortion by forward diffusion (paper, Eq. 4 and appendix A.1)."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

STEPS = 1000


def betas(schedule: str, *, beta_start: float = 1e-5, beta_end: float = 5e-3) -> Tensor:
    """The 1000 betas of a diffusion schedule, float32, bit for bit those of diffusers' ``DDPMScheduler``.

    ``sigmoid`` with the defaults is appendix A.1: sigmoid(l_t) * (0.5e-2 - 1e-5) + 1e-5, l_t from -6 to 6 (Eq. 4's
    xi is 1 - beta: read literally it would erase the picture, and the released code takes it as beta too).
    ``linear`` runs from beta_start to beta_end; ``cosine`` (diffusers' squaredcos_cap_v2) ignores both.
    """
    if schedule == "sigmoid":
        return torch.sigmoid(torch.linspace(-6, 6, STEPS)) * (beta_end - beta_start) + beta_start
    if schedule == "linear":
        return torch.linspace(beta_start, beta_end, STEPS, dtype=torch.float32)
    if schedule == "cosine":

        def alpha_bar(t: float) -> float:
            return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

        steps = range(STEPS)
        return torch.tensor([min(1 - alpha_bar((i + 1) / STEPS) / alpha_bar(i / STEPS), 0.999) for i in steps])
    raise ValueError(f"noise.schedule={schedule!r} is not one of sigmoid, linear, cosine")


@lru_cache(maxsize=16)
def signal_and_noise(schedule: str, step: int, beta_start: float, beta_end: float) -> tuple[float, float]:
    """(sqrt(xi_bar_k), sqrt(1 - xi_bar_k)) of Eq. 4 at ``step`` k in 0..999, as float32 values."""
    if not 0 <= step < STEPS:
        raise ValueError(f"noise.step={step} must lie in 0..{STEPS - 1}")
    product = torch.cumprod(1.0 - betas(schedule, beta_start=beta_start, beta_end=beta_end), dim=0)[step]
    return product.sqrt().item(), (1 - product).sqrt().item()


def distort(
    x: Tensor, eps: Tensor, *, step: int, schedule: str = "sigmoid", beta_start: float = 1e-5, beta_end: float = 5e-3
) -> Tensor:
    """x(k) = sqrt(xi_bar_k) x + sqrt(1 - xi_bar_k) eps (Eq. 4).

    Args:
        x: picture of any shape (the tensor the model sees, or values in [0, 1]); eps: standard normal, same shape.
        step: k in 0..999; the paper uses 500 (Table 5).
    """
    signal, noise = signal_and_noise(schedule, step, beta_start, beta_end)
    return signal * x + noise * eps


def to_bytes(picture: Tensor, *, wrap_around: bool) -> Tensor:
    """Values around [0, 1] to 8 bits (uint8).

    ``wrap_around=True`` is what the released code does on x86: 255 x is truncated towards zero and taken modulo 256,
    so that values outside [0, 1] come back at the other end. Otherwise the picture is clamped first and rounded.
    """
    if wrap_around:
        return (picture * 255).to(torch.int32).bitwise_and(255).to(torch.uint8)
    return (picture.clamp(0, 1) * 255).round().to(torch.uint8)


def draw(shape: tuple[int, ...], *, seed: int, epoch: int, record: int) -> Tensor:
    """Standard normal eps (float32, CPU) that depends on nothing but seed, epoch and record number.

    The same record gets the same noise whatever the batch size, the number of workers or of devices, and after a
    resume.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) * 100_000_007 + record)
    return torch.randn(shape, generator=generator)
