from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from povid.method.objective import (
    LogProbs,
    most_likely,
    povid,
    preferred_only,
    released,
    text_dispreference,
    token_logps,
)

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "objective.json"


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_policy_equal_to_reference_gives_log_2():
    """All rewards are zero, so each sigmoid is 1/2 and each loss log 2 = 0.693147..., whatever the coefficients."""
    same = LogProbs(t(-3.0, -8.0), t(-4.0, -9.0), t(-5.0, -1.0))
    for loss in (
        text_dispreference(same, same, alpha=0.1).loss_B,
        povid(same, same, alpha=0.1, beta_text=0.05, beta_noise=0.05).loss_B,
        released(same, same, beta=0.1, weight_text=0.5, weight_noise=0.5).loss_B,
    ):
        torch.testing.assert_close(loss, torch.full((2,), math.log(2), dtype=torch.float64))


def test_eq_3_by_hand():
    """alpha 0.1; policy (-10, -14), reference (-12, -13).

    rewards: 0.1 * (-10 + 12) = 0.2 and 0.1 * (-14 + 13) = -0.1; margin 0.3;
    -log sigmoid(0.3) = log(1 + e^-0.3) = log(1.7408182) = 0.5543552.
    """
    out = text_dispreference(LogProbs(t(-10), t(-14)), LogProbs(t(-12), t(-13)), alpha=0.1)
    assert out.reward_preferred_B.item() == pytest.approx(0.2)
    assert out.reward_text_B.item() == pytest.approx(-0.1)
    assert out.loss_B.item() == pytest.approx(0.5543552, abs=1e-7)
    assert out.reward_noise_B is None


def test_eq_5_by_hand():
    """alpha 0.1, beta_1 0.05, beta_2 0.02; policy (-10, -14, -6), reference (-12, -13, -11).

    0.1 * 2 - (0.05 * -1 + 0.02 * 5) = 0.2 - 0.05 = 0.15; log(1 + e^-0.15) = log(1.8607080) = 0.6209571.
    Without the text term (ablation noise, beta_1 = 0): 0.2 - 0.1 = 0.1; log(1 + e^-0.1) = 0.6443967.
    """
    policy, reference = LogProbs(t(-10), t(-14), t(-6)), LogProbs(t(-12), t(-13), t(-11))
    out = povid(policy, reference, alpha=0.1, beta_text=0.05, beta_noise=0.02)
    assert out.loss_B.item() == pytest.approx(0.6209571, abs=1e-7)
    assert out.reward_noise_B.item() == pytest.approx(0.1)
    alone = povid(policy._replace(text=None), reference, alpha=0.1, beta_text=0.05, beta_noise=0.02)
    zero = povid(policy, reference, alpha=0.1, beta_text=0.0, beta_noise=0.02)
    assert alone.loss_B.item() == pytest.approx(0.6443967, abs=1e-7)
    assert alone.loss_B.item() == zero.loss_B.item()


def test_released_variant_by_hand():
    """beta 0.1, halves; policy (-10, -14, -6), reference (-12, -13, -11).

    text pair: 0.2 + 0.1 = 0.3 -> 0.5543552; noise pair: 0.2 - 0.5 = -0.3 -> 0.5543552 + 0.3 = 0.8543552;
    mean 0.7043552; the noise pair alone 0.8543552.
    """
    policy, reference = LogProbs(t(-10), t(-14), t(-6)), LogProbs(t(-12), t(-13), t(-11))
    out = released(policy, reference, beta=0.1, weight_text=0.5, weight_noise=0.5)
    assert out.loss_B.item() == pytest.approx(0.7043552, abs=1e-7)
    alone = released(policy._replace(text=None), reference, beta=0.1, weight_text=0.5, weight_noise=0.5)
    assert alone.loss_B.item() == pytest.approx(0.8543552, abs=1e-7)
    assert alone.reward_text_B is None and alone.reward_noise_B.item() == pytest.approx(0.5)


def test_preferred_only_by_hand():
    """-(-10) / 4 tokens = 2.5."""
    assert preferred_only(LogProbs(t(-10)), LogProbs(t(-9)), tokens_B=t(4)).loss_B.item() == 2.5


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
        models.append(LogProbs(preferred, summed(golden, f"{model}_text", l), noise))
    expected = golden["expected_released"]
    torch.testing.assert_close(models[0].noise, t(*expected["policy_noise"]))
    torch.testing.assert_close(models[1].noise, t(*expected["reference_noise"]))
    out = released(*models, beta=0.1, weight_text=0.5, weight_noise=0.5)
    torch.testing.assert_close(out.loss_B, t(*expected["loss"]))


def test_golden_eq_5(golden):
    """The policy's tokens, scored by both on the noised image."""
    w, l = golden["labels_preferred"], golden["labels_text"]
    tokens = argmax_labels(golden, "policy_preferred_noisy")
    assert [row[1:] for row in tokens] == golden["expected_paper"]["noise_tokens"]
    policy, reference = (
        LogProbs(
            summed(golden, f"{model}_preferred_clean", w),
            summed(golden, f"{model}_text", l),
            summed(golden, f"{model}_preferred_noisy", tokens),
        )
        for model in ("policy", "reference")
    )
    torch.testing.assert_close(policy.noise, t(*golden["expected_paper"]["policy_noise"]))
    torch.testing.assert_close(reference.noise, t(*golden["expected_paper"]["reference_noise"]))
    out = povid(policy, reference, alpha=0.1, beta_text=0.05, beta_noise=0.05)
    torch.testing.assert_close(out.loss_B, t(*golden["expected_paper"]["loss"]))
