from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from povid.method.noise import betas, distort, draw, signal_and_noise, to_bytes

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "noise.json"
PAPER = {"beta_start": 1e-5, "beta_end": 5e-3}


def test_values_of_eq_4():
    """sqrt(xi_bar_500) = 0.8630172, sqrt(1 - xi_bar_500) = 0.5051745 and sqrt(xi_bar_999) = 0.285043."""
    assert signal_and_noise("sigmoid", 500, **_bounds()) == pytest.approx((0.8630172, 0.5051745), abs=2e-7)
    assert signal_and_noise("sigmoid", 999, **_bounds())[0] == pytest.approx(0.285043, abs=1e-6)


def _bounds() -> dict:
    return PAPER


@pytest.mark.parametrize(
    ("ours", "theirs", "bounds"),
    [
        ("sigmoid", "sigmoid", PAPER),
        ("linear", "linear", {"beta_start": 1e-4, "beta_end": 0.02}),
        ("cosine", "squaredcos_cap_v2", {}),
    ],
)
def test_betas_and_noised_pictures_are_diffusers_bit_for_bit(ours, theirs, bounds):
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule=theirs, **bounds)
    assert torch.equal(betas(ours, **bounds), scheduler.betas)
    x, eps = torch.rand(1, 3, 8, 8), torch.randn(1, 3, 8, 8)
    for step in (0, 250, 500, 999):
        expected = scheduler.add_noise(x, eps, torch.tensor([step]))
        assert torch.equal(distort(x, eps, step=step, schedule=ours, **bounds), expected)


def test_golden_pictures_and_wrap_around():
    golden = json.loads(GOLDEN.read_text())
    x = torch.tensor(golden["x"])
    for step, case in golden["cases"].items():
        noised = distort(x, torch.tensor(case["eps"]), step=int(step))
        torch.testing.assert_close(noised, torch.tensor(case["x_k"]), rtol=0, atol=1e-6)
        wrapped = to_bytes(torch.tensor(case["x_k"]), wrap_around=True)
        assert wrapped.tolist() == case["bytes_with_wrap_around"]


def test_bytes_by_hand():
    """-0.01 * 255 = -2.55 -> -2 -> 254; 1.01 * 255 = 257.55 -> 257 -> 1; 0.5 * 255 = 127.5 -> 127 or, rounded, 128."""
    values = torch.tensor([-0.01, 1.01, 0.5])
    assert to_bytes(values, wrap_around=True).tolist() == [254, 1, 127]
    assert to_bytes(values, wrap_around=False).tolist() == [0, 255, 128]


def test_noise_belongs_to_the_record():
    one = draw((3, 4), seed=1, epoch=0, record=5)
    assert torch.equal(one, draw((3, 4), seed=1, epoch=0, record=5))
    others = [draw((3, 4), seed=s, epoch=e, record=r) for s, e, r in ((2, 0, 5), (1, 1, 5), (1, 0, 6))]
    assert not any(torch.equal(one, other) for other in others)


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="noise.schedule='quadratic'"):
        betas("quadratic")
    with pytest.raises(ValueError, match=r"noise.step=1000 must lie in 0..999"):
        signal_and_noise("sigmoid", 1000, 1e-5, 5e-3)
