"""Eq. 4 through diffusers, bit for bit what it is when written out, and the released code's 8-bit wrap-around."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image

from povid.method.distortions import distort_picture, generator
from povid.method.distortions.diffusion import Diffusion

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "noise.json"


def scheduler(schedule: str = "sigmoid", **bounds: float) -> DDPMScheduler:
    bounds = bounds or {"beta_start": 1e-5, "beta_end": 5e-3}
    return DDPMScheduler(num_train_timesteps=1000, beta_schedule=schedule, **bounds)


def plain_betas(schedule: str, beta_start: float = 0, beta_end: float = 0) -> torch.Tensor:
    """Appendix A.1's formula, DDPM's line, and the cosine of Nichol and Dhariwal."""
    if schedule == "sigmoid":
        return torch.sigmoid(torch.linspace(-6, 6, 1000)) * (beta_end - beta_start) + beta_start
    if schedule == "linear":
        return torch.linspace(beta_start, beta_end, 1000)

    def alpha_bar(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    return torch.tensor([min(1 - alpha_bar((i + 1) / 1000) / alpha_bar(i / 1000), 0.999) for i in range(1000)])


def test_noised_pictures_are_eq_4_bit_for_bit():
    x = torch.rand(1, 3, 8, 8)
    for schedule, bounds in (
        ("sigmoid", {"beta_start": 1e-5, "beta_end": 5e-3}),
        ("linear", {"beta_start": 1e-4, "beta_end": 0.02}),
        ("squaredcos_cap_v2", {}),
    ):
        xi_bar = torch.cumprod(1 - plain_betas(schedule, **bounds), 0)
        for step in (0, 250, 500, 999):
            eps = torch.randn(x.shape, generator=generator(seed=1, epoch=2, record=step))
            expected = xi_bar[step].sqrt().item() * x + (1 - xi_bar[step]).sqrt().item() * eps
            distortion = Diffusion(scheduler(schedule, **bounds), step)
            assert torch.equal(distortion(x, generator(seed=1, epoch=2, record=step)), expected)


def test_golden_pictures_and_wrap_around():
    """sqrt(xi_bar_500) = 0.8630172 and sqrt(1 - xi_bar_500) = 0.5051745 stand behind the golden pictures."""
    golden = json.loads(GOLDEN.read_text())
    x = torch.tensor(golden["x"])
    for step, case in golden["cases"].items():
        noised = scheduler().add_noise(x[None], torch.tensor(case["eps"])[None], torch.tensor([int(step)]))[0]
        torch.testing.assert_close(noised, torch.tensor(case["x_k"]), rtol=0, atol=1e-6)
        wrapped = Diffusion(scheduler(), space="pixel", wrap_around=True).to_bytes(torch.tensor(case["x_k"]))
        assert wrapped.tolist() == case["bytes_with_wrap_around"]


def test_bytes_by_hand():
    """-0.01 * 255 = -2.55 -> -2 -> 254; 1.01 * 255 = 257.55 -> 257 -> 1; 0.5 * 255 = 127.5 -> 127 or, rounded, 128."""
    values = torch.tensor([-0.01, 1.01, 0.5])
    assert Diffusion(scheduler(), space="pixel", wrap_around=True).to_bytes(values).tolist() == [254, 1, 127]
    assert Diffusion(scheduler(), space="pixel").to_bytes(values).tolist() == [0, 255, 128]


def test_noise_belongs_to_the_record():
    picture = Image.new("RGB", (5, 3), (200, 10, 90))

    def drawn(**place: int) -> bytes:
        return distort_picture(Diffusion(scheduler()), picture, generator(**place)).tobytes()

    one = drawn(seed=1, epoch=0, record=5)
    assert one == drawn(seed=1, epoch=0, record=5)
    assert (
        len({one, drawn(seed=2, epoch=0, record=5), drawn(seed=1, epoch=1, record=5), drawn(seed=1, epoch=0, record=6)})
        == 4
    )


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="step: found 1000; the scheduler has steps 0 to 999"):
        Diffusion(scheduler(), 1000)
    with pytest.raises(ValueError, match="needs space=pixel"):
        Diffusion(scheduler(), wrap_around=True)
