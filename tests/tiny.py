"""A random LLaVA of a few thousand parameters and a processor to go with it, for tests."""

from __future__ import annotations

from collections.abc import Set
from functools import partial
from pathlib import Path

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from PIL import Image
from transformers import get_scheduler

from povid.method.distortions.diffusion import Diffusion
from povid.method.objectives import Objective
from povid.model.debug_llava import prepare
from povid.model.loading import LocalModel, LoraSettings
from povid.model.policy import Policy
from povid.model.template import Template
from povid.preferences.triple import Triple, Turn
from povid.training.module import POVIDModule, StageSettings

WORDS = (
    "A dog and cat sit on the mat near a red bus in town . Describe this image What is Is there Yes No it two "
    "three people walk with umbrella under tree beside blue car"
).split()


def save_tiny_llava(folder: Path, *, seed: int = 0, width: int = 32, layers: int = 2, image: int = 32) -> Path:
    """With weights so large that everything differs from everything."""
    return prepare(
        folder,
        seed=seed,
        image=image,
        patch=8,
        width=width,
        layers=layers,
        vision_width=24,
        vision_layers=3,
        positions=512,
        words=[" ".join(WORDS), "USER: ASSISTANT:"],
        spread=0.3,
    )


def settings(folder: Path, **changes) -> LocalModel:
    values = {
        "name": "tiny",
        "path": str(folder),
        "dtype": "float32",
        "max_length": 128,
        "lora": LoraSettings(r=4, alpha=8, dropout=0.0),
        **changes,
    }
    return LocalModel(**values)


def load(
    folder: Path, *, adapted: bool = True, dtype: torch.dtype = torch.float32, perturb: bool = True, **changes
) -> tuple[Policy, Template]:
    """A policy whose adapter is not zero, so that policy and reference differ."""
    model_settings = settings(folder, **changes)
    torch.manual_seed(1)
    policy = model_settings.policy(adapted=adapted)
    if adapted and perturb:
        for parameter in (p for group in policy.trained_parameters() for p in group):
            parameter.data += 0.05 * torch.randn_like(parameter)
    return policy.to(dtype), model_settings.template(policy.processor)


def picture(folder: Path, name: str, seed: int, size: tuple[int, int] = (40, 32)) -> Path:
    path = folder / f"{name}.png"
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    Image.fromarray(pixels.to(torch.uint8).numpy()).save(path)
    return path


def triple(name: str, image: Path, *turns: tuple[str, str, str]) -> Triple:
    """Each turn: question, preferred response, dispreferred response."""
    return Triple(
        name,
        image,
        tuple(t for q, w, _ in turns for t in (Turn("user", q), Turn("assistant", w))),
        tuple(t for q, _, l in turns for t in (Turn("user", q), Turn("assistant", l))),
    )


def triples(folder: Path) -> list[Triple]:
    """Four records: short, long, multi-turn, and responses of wildly different length."""
    pictures = [picture(folder, f"p{i}", i) for i in range(4)]
    return [
        triple("short", pictures[0], ("Is there a dog", "Yes", "No")),
        triple(
            "long",
            pictures[1],
            (
                "Describe this image.",
                "A dog and cat sit on the mat near a red bus in town.",
                "A dog and two people sit on the mat near a blue car.",
            ),
        ),
        triple(
            "turns",
            pictures[2],
            ("What is it", "A red bus", "A red car"),
            ("Is there a tree", "No", "Yes"),
            ("Describe this image.", "three people walk", "three people walk with umbrella under tree"),
        ),
        triple(
            "uneven",
            pictures[3],
            (
                "Describe this image.",
                "A cat",
                "two cat and three dog walk near the blue bus "
                "beside a tree with umbrella and people sit on the red mat in town .",
            ),
        ),
    ]


def noise(step: int = 500, **changes) -> Diffusion:
    """Eq. 4 with the schedule of appendix A.1."""
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="sigmoid", beta_start=1e-5, beta_end=5e-3)
    return Diffusion(scheduler, step, **changes)


def module(policy: Policy, objective: Objective, settings: StageSettings, terms: Set[str], **more) -> POVIDModule:
    """With conf/optimizer/adamw.yaml and conf/schedule/cosine.yaml."""
    usual = {"optimizer": partial(torch.optim.AdamW, foreach=True), "schedule": partial(get_scheduler, "cosine")}
    return POVIDModule(policy, objective, settings, terms, **usual | more)


def stage(*dispreferences: str, **changes) -> StageSettings:
    """Two epochs in batches of two."""
    values = {"epochs": 2, "lr": 1e-3, "projector_lr": 1e-4, "batch_size": 2, "warmup_ratio": 0.25, **changes}
    return StageSettings(name="stage", dispreferences=list(dispreferences), **values)
