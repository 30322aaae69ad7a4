"""Objectives worked out by hand, and held to golden values of the released trainer's own functions."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from povid.method.noise_dispreferred import most_likely
from povid.method.objectives import Terms
from povid.method.objectives.dpo import DPO
from povid.method.objectives.povid import POVID
from povid.method.objectives.preferred_only import PreferredOnly
from povid.method.objectives.released import Released
from povid.training.scoring import token_logps

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "objective.json"
NO_COUNTS = Terms()


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_policy_equal_to_reference_gives_log_2():
    """All rewards are zero, so each sigmoid is 1/2 and each loss log 2 = 0.693147..., whatever the coefficients."""
    same = Terms(*(t(-3.0, -8.0) - i for i in range(5)))
    for objective in (DPO(), POVID(), Released()):
        loss_B = objective(same, same, NO_COUNTS).loss_B
        torch.testing.assert_close(loss_B, torch.full((2,), math.log(2), dtype=torch.float64))


def test_eq_3_by_hand():
    """alpha 0.1; policy (-10, -14), reference (-12, -13).

    rewards: 0.1 * (-10 + 12) = 0.2 and 0.1 * (-14 + 13) = -0.1; margin 0.3;
    -log sigmoid(0.3) = log(1 + e^-0.3) = log(1.7408182) = 0.5543552.
    """
    out = DPO(alpha=0.1)(Terms(t(-10), t(-14)), Terms(t(-12), t(-13)), NO_COUNTS)
    assert {name: reward_B.item() for name, reward_B in out.rewards.items()} == pytest.approx(
        {"preferred": 0.2, "text": -0.1}
    )
    assert out.loss_B.item() == pytest.approx(0.5543552, abs=1e-7)


def test_eq_5_by_hand():
    """alpha 0.1, beta_1 0.05, beta_2 0.02; policy (-10, -14, -6), reference (-12, -13, -11).

    0.1 * 2 - (0.05 * -1 + 0.02 * 5) = 0.2 - 0.05 = 0.15; log(1 + e^-0.15) = log(1.8607080) = 0.6209571.
    Without the text term (ablation noise, beta_1 = 0): 0.2 - 0.1 = 0.1; log(1 + e^-0.1) = 0.6443967.
    """
    policy, reference = Terms(t(-10), t(-14), t(-6)), Terms(t(-12), t(-13), t(-11))
    out = POVID(0.1, 0.05, 0.02)(policy, reference, NO_COUNTS)
    assert out.loss_B.item() == pytest.approx(0.6209571, abs=1e-7)
    assert out.rewards["noise"].item() == pytest.approx(0.1)
    alone = POVID(0.1, 0.05, 0.02)(policy._replace(text=None), reference, NO_COUNTS)
    zero = POVID(0.1, 0.0, 0.02)(policy, reference, NO_COUNTS)
    assert alone.loss_B.item() == pytest.approx(0.6443967, abs=1e-7)
    assert alone.loss_B.item() == zero.loss_B.item()


def test_released_variant_by_hand():
    """beta 0.1, halves; policy (-10, -14, -6), reference (-12, -13, -11).

    text pair: 0.2 + 0.1 = 0.3 -> 0.5543552; noise pair: 0.2 - 0.5 = -0.3 -> 0.5543552 + 0.3 = 0.8543552;
    mean 0.7043552; the noise pair alone 0.8543552.
    """
    policy = Terms(t(-10), t(-14), noise_on_clean=t(-6))
    reference = Terms(t(-12), t(-13), noise_on_clean=t(-11))
    assert Released()(policy, reference, NO_COUNTS).loss_B.item() == pytest.approx(0.7043552, abs=1e-7)
    alone = Released()(policy._replace(text=None), reference, NO_COUNTS)
    assert alone.loss_B.item() == pytest.approx(0.8543552, abs=1e-7)
    assert "text" not in alone.rewards
    assert alone.rewards["noise"].item() == pytest.approx(0.5)


def test_preferred_only_by_hand():
    """-(-10) / 4 tokens = 2.5."""
    assert PreferredOnly()(Terms(t(-10)), Terms(t(-9)), Terms(t(4))).loss_B.item() == 2.5


def test_an_ablation_leaves_out_what_an_objective_can_do_without():
    assert POVID().terms({"text", "noise"}) == {"preferred", "text", "noise"}
    assert POVID().terms({"noise"}) == {"preferred", "noise"}
    assert Released().terms({"noise"}) == {"preferred", "noise_on_clean"}
    assert PreferredOnly().terms({"text", "noise"}) == {"preferred"}
    with pytest.raises(ValueError, match="DPO needs text dispreferences, and this stage has noise"):
        DPO().terms({"noise"})


def test_token_logps_is_log_softmax():
    logits = torch.randn(5, 11, generator=torch.Generator().manual_seed(1))
    tokens = torch.tensor([0, 3, 10, 3, 1])
    expected = logits.log_softmax(-1)[torch.arange(5), tokens]
    torch.testing.assert_close(token_logps(logits, tokens), expected)
    assert token_logps(logits.bfloat16(), tokens).dtype == torch.float32


@pytest.fixture(scope="module")
def golden() -> dict:
    return json.loads(GOLDEN.read_text())


def summed(golden: dict, logits: str, labels: list[list[int]]) -> torch.Tensor:
    """Position p predicts the label at p + 1; -100 is no response."""
    logits_BTV, labels_BT = t(*golden["logits"][logits]), torch.tensor(labels)[:, 1:]
    mask = labels_BT != -100
    logps = logits_BTV[:, : labels_BT.shape[1]].log_softmax(-1).gather(-1, labels_BT.clamp(min=0)[..., None])[..., 0]
    return (logps * mask).sum(-1)


def argmax_labels(golden: dict, logits: str) -> list[list[int]]:
    """y_l^n in the place of y_w."""
    chosen = most_likely(t(*golden["logits"][logits]))[:, :-1]
    labels = torch.tensor(golden["labels_preferred"])
    return torch.cat([labels[:, :1], torch.where(labels[:, 1:] != -100, chosen, -100)], dim=1).tolist()


def test_golden_released(golden):
    """The released trainer's own functions: each model takes its own argmax on the noised image and scores it on the
    clean image's logits."""
    w, l = golden["labels_preferred"], golden["labels_text"]
    models = []
    for model in ("policy", "reference"):
        noise = summed(golden, f"{model}_preferred_clean", argmax_labels(golden, f"{model}_preferred_noisy"))
        preferred = summed(golden, f"{model}_preferred_clean", w)
        models.append(Terms(preferred, summed(golden, f"{model}_text", l), noise_on_clean=noise))
    expected = golden["expected_released"]
    torch.testing.assert_close(models[0].noise_on_clean, t(*expected["policy_noise"]))
    torch.testing.assert_close(models[1].noise_on_clean, t(*expected["reference_noise"]))
    torch.testing.assert_close(Released()(*models, NO_COUNTS).loss_B, t(*expected["loss"]))


def test_golden_eq_5(golden):
    """The policy's tokens, scored by both on the noised image."""
    w, l = golden["labels_preferred"], golden["labels_text"]
    tokens = argmax_labels(golden, "policy_preferred_noisy")
    assert [row[1:] for row in tokens] == golden["expected_paper"]["noise_tokens"]
    policy, reference = (
        Terms(
            summed(golden, f"{model}_preferred_clean", w),
            summed(golden, f"{model}_text", l),
            summed(golden, f"{model}_preferred_noisy", tokens),
        )
        for model in ("policy", "reference")
    )
    torch.testing.assert_close(policy.noise, t(*golden["expected_paper"]["policy_noise"]))
    torch.testing.assert_close(reference.noise, t(*golden["expected_paper"]["reference_noise"]))
    torch.testing.assert_close(POVID()(policy, reference, NO_COUNTS).loss_B, t(*golden["expected_paper"]["loss"]))
