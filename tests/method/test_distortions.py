"""Eq. 4 through diffusers, bit for bit what it is when written out, the released code's 8-bit wrap-around, and the
other distortions."""

from __future__ import annotations

import json
import math
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image
from pydantic import ValidationError

from povid.fault import Fault
from povid.method.distortions import distort_picture, generator, to_tensor
from povid.method.distortions.blur import Blur
from povid.method.distortions.crop import Crop
from povid.method.distortions.diffusion import Diffusion
from povid.method.distortions.mean_color import MeanColor
from povid.method.distortions.other_picture import OtherPicture
from povid.method.distortions.patch_mask import PatchMask

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
    with pytest.raises(ValueError, match=r"scheduler: RePaintScheduler cannot add noise to a picture \(Use"):
        Diffusion(diffusers.RePaintScheduler())
    with pytest.raises(ValueError, match="scheduler: the noise of FlowMatchHeunDiscreteScheduler does not grow"):
        Diffusion(diffusers.FlowMatchHeunDiscreteScheduler())
    with pytest.raises(ValueError, match="smallest: found 0.5, needed at most largest, which is 0.2"):
        Crop(smallest=0.5)
    for kind, wrong in (
        (Crop, {"smallest": 0}),
        (Crop, {"largest": 1.5}),
        (Blur, {"sigma": 0}),
        (Blur, {"sigma": math.nan}),
        (PatchMask, {"share": 0}),
        (PatchMask, {"share": 1.01}),
        (PatchMask, {"grid": 0}),
    ):
        with pytest.raises(ValidationError):
            kind(**wrong)


# Schedulers of diffusers that add no noise to a picture: of tokens, of proteins, without noise levels of their own, or
# (FlowMatchHeun) with those of a single step.
NOT_OF_PICTURES = {
    "AmusedScheduler",
    "BlockRefinementScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "HeliosDMDScheduler",
    "KarrasVeScheduler",
    "MiniMaxH3Scheduler",
    "RFD4ProteinaScheduler",
    "RePaintScheduler",
    "ScoreSdeVeScheduler",
}


def noising_schedulers() -> list[type]:
    """Every scheduler class of diffusers that can be imported here and has a method that adds noise."""
    found = []
    for name in sorted(n for n in dir(diffusers) if n.endswith("Scheduler") and not n.startswith("Flax")):
        kind = getattr(diffusers, name)
        try:
            if hasattr(kind, "add_noise") or hasattr(kind, "scale_noise"):
                found.append(kind)
        except ImportError:  # a stand-in for one that needs a further package
            continue
    return found


def test_every_diffusers_scheduler_noises_a_picture_or_is_refused():
    """Noise grows with the step; whoever has DDPM's betas mixes x and eps as Eq. 4 does at that very step."""
    kinds, refused, eq_4 = noising_schedulers(), set(), set()
    x, ddpm = torch.rand(3, 6, 6), DDPMScheduler()
    for kind in kinds:
        try:
            scheduler = kind()
        except TypeError:  # it cannot be made without what belongs to tokens or proteins
            refused.add(kind.__name__)
            continue
        steps = getattr(scheduler.config, "num_train_timesteps", None) or 1000
        try:
            noised = [
                Diffusion(kind(), step)(x, generator(seed=0, epoch=0, record=0))
                for step in (0, steps // 4, steps // 2, steps - 1)
            ]
        except ValueError:
            refused.add(kind.__name__)
            continue
        gone = [(each - x).norm().item() for each in noised]
        assert gone == sorted(gone) and gone[0] < 0.2 * gone[-1], kind
        assert noised[-1].std() < 1.5, kind  # of unit variance at most, whatever the scheduler's own scale is
        config = scheduler.config
        if (getattr(config, "beta_schedule", ""), getattr(config, "beta_end", 0)) == ("linear", 0.02) and steps == 1000:
            eps = torch.randn(x.shape, generator=generator(seed=0, epoch=0, record=0))
            expected = ddpm.add_noise(x[None], eps[None], torch.tensor([500]))[0]
            torch.testing.assert_close(noised[2], expected, rtol=0, atol=0.01, msg=kind.__name__)
            eq_4.add(kind.__name__)
    assert refused <= NOT_OF_PICTURES and len(kinds) - len(refused) >= 25
    assert {"DDIMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"} <= eq_4


@pytest.fixture
def photograph() -> Image.Image:
    """60 x 40 pixels, all of them different."""
    number = np.arange(2400).reshape(40, 60)
    return Image.fromarray(np.stack([number % 256, number // 256, number % 7], -1).astype(np.uint8))


def test_every_distortion_keeps_the_size_and_belongs_to_the_record(photograph):
    """The number of a model's image tokens may depend on the size, and x^n stands in the place of x."""
    others = [Image.new("RGB", (9, 31), color) for color in ("red", "green", "blue")]
    for distortion, drawn in (
        (Crop(), True),
        (Blur(), False),
        (PatchMask(), True),
        (MeanColor(), False),
        (OtherPicture().among(others), True),
        (Diffusion(scheduler(), space="pixel"), True),
    ):
        before = photograph.tobytes()
        found = [
            distort_picture(distortion, photograph, generator(seed=0, epoch=0, record=record))
            for record in (0, 0, 1, 2, 3, 4)
        ]
        assert {picture.size for picture in found} == {photograph.size}
        assert before == photograph.tobytes() != found[0].tobytes() == found[1].tobytes()
        assert (len({picture.tobytes() for picture in found}) > 1) == drawn


def test_the_crop_is_a_part_of_the_picture_within_its_bounds():
    x = torch.arange(40 * 60, dtype=torch.float32).reshape(1, 40, 60).expand(3, -1, -1)
    crop, corners = Crop(smallest=0.25, largest=0.5), set()
    for record in range(50):
        part = crop(x, generator(seed=0, epoch=0, record=record))
        top, left = divmod(int(part[0, 0, 0]), 60)
        assert part.equal(x[:, top : top + part.shape[1], left : left + part.shape[2]])
        assert 0.24 < part[0].numel() / x[0].numel() < 0.52
        corners.add((top, left))
    assert len(corners) > 25
    assert Crop(smallest=1.0, largest=1.0)(x, generator(seed=0, epoch=0, record=0)).equal(x)
    assert Crop(smallest=1e-9, largest=1e-9)(x, generator(seed=0, epoch=0, record=0)).shape == (3, 1, 1)


def test_masked_patches_have_the_mean_color_and_the_others_stay(photograph):
    """A grid of 4 on 40 x 60 pixels: patches of 10 x 15, of which 30 % of 16 are 5."""
    x = to_tensor(photograph)
    masked = PatchMask(share=0.3, grid=4)(x, generator(seed=0, epoch=0, record=3))
    changed = (masked != x).any(0).unflatten(0, (4, 10)).unflatten(2, (4, 15)).transpose(1, 2).flatten(2)
    assert changed.all(-1).sum() == changed.any(-1).sum() == 5
    mean = x.mean((1, 2))
    assert torch.equal(masked[:, (masked != x).any(0)], mean[:, None].expand(3, 5 * 150))
    assert torch.equal(PatchMask(share=1.0)(x, generator(seed=0, epoch=0, record=0)), mean[:, None, None].expand_as(x))
    assert torch.equal(MeanColor()(x, generator(seed=0, epoch=0, record=0)), mean[:, None, None].expand_as(x))
    assert (PatchMask(share=1e-9, grid=99)(x, generator(seed=0, epoch=0, record=0)) != x).any(0).sum() == 1


def test_the_blur_is_gaussian_and_of_the_same_strength_at_every_size():
    """A white pixel becomes a bell: 0.05 of 100 pixels is a standard deviation of 5."""
    x = torch.zeros(3, 101, 101)
    x[:, :, 50] = 1.0
    bell = Blur(sigma=0.05)(x, generator(seed=0, epoch=0, record=0))[0, 50].double()
    place = torch.arange(101) - 50
    assert bell.sum().item() == pytest.approx(1, abs=0.05)
    assert ((bell * place**2).sum() / bell.sum()).sqrt().item() == pytest.approx(5, abs=0.3)
    edge = torch.zeros(3, 200, 200)
    edge[:, :, 100:] = 1.0
    small = torch.nn.functional.avg_pool2d(edge, 2)
    large = torch.nn.functional.avg_pool2d(Blur()(edge, generator(seed=0, epoch=0, record=0)), 2)
    torch.testing.assert_close(large, Blur()(small, generator(seed=0, epoch=0, record=0)), rtol=0, atol=0.02)


def test_the_other_picture_is_never_the_records_own(photograph):
    """Of four records two share a picture; alone with it, a record has no other."""
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    distortion = OtherPicture().among([photograph, red, photograph, blue])
    colors = set()
    for record in range(40):
        other = distort_picture(distortion, photograph, generator(seed=0, epoch=0, record=record))
        colors.add(other.getpixel((0, 0)))
    assert colors == {(255, 0, 0), (0, 0, 255)}
    with pytest.raises(Fault, match="the data's 2 records show no picture but this one"):
        distort_picture(OtherPicture().among([red, red.copy()]), red, generator(seed=0, epoch=0, record=0))
