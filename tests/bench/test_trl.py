"""TRL's own DPOTrainer as a second opinion for Eq. 3, gradients included."""

from __future__ import annotations

import math

import pytest
import torch

from povid.bench.arms import ours
from povid.bench.subject import SHAPES, adapt, build_model, build_processor, steps, twin


def test_eq_3_is_trls_sigmoid_loss():
    pytest.importorskip("trl", reason="TRL is not installed (extra: bench)")
    from povid.bench.trl_arm import trl_dpo

    shape = SHAPES["smallest"]
    processor, base = build_processor(shape), build_model(shape, device="cpu")
    policy = adapt(twin(base), processor, shape)
    arm, parameters = trl_dpo(policy, base, processor, checkpoint=False)
    mine = [parameter for group in policy.trained_parameters() for parameter in group]
    for step in steps(shape, processor, count=2, batch_size=2, device="cpu"):
        theirs = arm.run(step, None).item()
        loss = ours(policy, "stage 1").run(step, None).item()
        assert loss == pytest.approx(theirs, rel=1e-5) and abs(loss - math.log(2)) > 1e-4
    norms = [torch.stack([p.grad.norm() for p in group]).norm().item() for group in (mine, parameters)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
