"""How long a training step waits for its data: photographs decoded, padded, resized and hashed by loader processes."""

from __future__ import annotations

import time
from typing import Any

from povid.bench.arms import ours
from povid.bench.subject import Shape, Step, paper_noise, template_for, triples
from povid.method.objectives.povid import POVID
from povid.model.policy import Policy
from povid.training.datamodule import PreferenceDataModule


def waiting(
    policy: Policy, processor: Any, shape: Shape, *, workers: int, count: int = 60, pixels: tuple[int, int] = (336, 336)
) -> dict[str, float]:
    """Milliseconds per step that stage 2 (Eq. 5, the one that needs two images) takes and waits, after ten steps in
    which the loader processes start.

    On a CPU the loaders work on the same cores as the step, so what they take shows in the step as well.
    """
    made = triples(shape, count, pixels=pixels, seed=1000)
    data = PreferenceDataModule(
        made,
        template_for(processor),
        terms=POVID.needs,
        distortion=paper_noise(),
        packable=True,
        batch_size=1,
        seed=0,
        workers=workers,
    )
    data.trainer = None
    arm = ours(policy, "eq5")
    waited = worked = 0.0
    batches = iter(data.train_dataloader())
    for number in range(count):
        start = time.perf_counter()
        batch = next(batches)
        ready = time.perf_counter()
        arm.run(Step((), batch, batch), None)
        policy.zero_grad()
        if number >= 10:
            waited += ready - start
            worked += time.perf_counter() - ready
    steps = count - 10
    return {
        "workers": workers,
        "waits_ms": 1e3 * waited / steps,
        "works_ms": 1e3 * worked / steps,
        "share": waited / (waited + worked),
    }
