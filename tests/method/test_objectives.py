"""Objectives worked out by hand, and held to golden values of the released trainer's own functions."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from povid.method.noise_dispreferred import most_likely
from povid.method.objectives import Objective, Terms
from povid.method.objectives.apo_zero import APOZero
from povid.method.objectives.ddpo import DDPO
from povid.method.objectives.dpo import DPO
from povid.method.objectives.ipo import IPO
from povid.method.objectives.mdpo import MDPO
from povid.method.objectives.povid import POVID
from povid.method.objectives.preferred_only import PreferredOnly
from povid.method.objectives.released import Released
from povid.method.objectives.rpo import RPO
from povid.method.objectives.simpo import SimPO
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


def test_where_the_others_begin():
    """All rewards are zero: ipo (1 / 0.2)^2 = 25 = 1 / (4 * 0.01), apo_zero 1 - 1/2 + 1/2, mdpo three times log 2, with
    delta 1 log(1 + e) = 1.3132617 in the anchor's place."""
    same, counts = Terms(*(t(-3.0, -8.0) - i for i in range(5))), Terms(*[t(4, 6)] * 5)
    for objective, loss in (
        (IPO(0.1), 25),
        (APOZero(), 1),
        (DDPO(), math.log(2)),
        (MDPO(), 3 * math.log(2)),
        (MDPO(delta=1.0), 2 * math.log(2) + 1.3132617),
    ):
        found = objective(same, same, counts).loss_B
        torch.testing.assert_close(found, torch.full((2,), loss, dtype=torch.float64), rtol=1e-7, atol=1e-7)


PAIR = Terms(t(-10), t(-14)), Terms(t(-12), t(-13)), Terms(t(4), t(5))
NOISE = {"noise": t(-6)}, {"noise": t(-11)}, {"noise": t(4)}


def both() -> tuple[Terms, Terms, Terms]:
    policy, reference, tokens = (terms._replace(**more) for terms, more in zip(PAIR, NOISE))
    return policy, reference, tokens


def test_ipo_by_hand():
    """r: 2 over 4 tokens, -1 over 5, and of y_l^n 5 over 4; beta 0.5, so that the margin is 1.

    0.5 + 0.2 - 1 = -0.3, squared 0.09; 0.5 - 1.25 - 1 = -1.75, squared 3.0625; mean 1.57625.
    """
    out = IPO(beta=0.5)(*PAIR)
    assert out.loss_B.item() == pytest.approx(0.09) and out.rewards["text"].item() == pytest.approx(-0.2)
    assert IPO(beta=0.5)(*both()).loss_B.item() == pytest.approx(1.57625)


def test_simpo_by_hand():
    """beta 2, gamma 0.25 * 2 = 0.5; means -2.5 and -2.8, and of y_l^n -1.5.

    -5 + 5.6 - 0.5 = 0.1, log(1 + e^-0.1) = 0.6443967; -5 + 3 - 0.5 = -2.5, log(1 + e^2.5) = 2.5788897; mean 1.6116432.
    The reference is not read.
    """
    simpo = SimPO(beta=2.0, gamma_beta_ratio=0.25)
    assert simpo.reference is False
    out = simpo(PAIR[0], None, PAIR[2])
    assert out.loss_B.item() == pytest.approx(0.6443967, abs=1e-7)
    assert {name: reward.item() for name, reward in out.rewards.items()} == pytest.approx(
        {"preferred": -5, "text": -5.6}
    )
    policy, _, tokens = both()
    assert simpo(policy, None, tokens).loss_B.item() == pytest.approx(1.6116432, abs=1e-7)


def test_apo_zero_by_hand():
    """beta 0.5: rewards 1, -0.5 and, of y_l^n, 2.5; sigmoids 0.7310586, 0.3775407 and 0.9241418.

    1 - 0.7310586 + 0.3775407 = 0.6464821; with the mean of both, 0.6508412, 0.9197827.
    """
    assert APOZero(beta=0.5)(*PAIR).loss_B.item() == pytest.approx(0.6464821, abs=1e-7)
    assert APOZero(beta=0.5)(*both()).loss_B.item() == pytest.approx(0.9197827, abs=1e-7)


def test_rpo_adds_the_likelihood_to_any_objective():
    """Eq. 3 is 0.5543552 and Eq. 5 with 0.05 and 0.02 is 0.6209571, both as above; 0.2 * 10 / 4 = 0.5 comes on top.

    Whatever scoring asks of an objective, it asks of the one inside.
    """
    assert RPO(DPO(), 0.2)(*PAIR).loss_B.item() == pytest.approx(1.0543552, abs=1e-7)
    assert RPO(POVID(0.1, 0.05, 0.02), 0.2)(*both()).loss_B.item() == pytest.approx(1.1209571, abs=1e-7)
    assert RPO(SimPO(), 0.2)(PAIR[0], None, PAIR[2]).rewards == SimPO()(PAIR[0], None, PAIR[2]).rewards
    for inside in (DPO(), POVID(differing_only=True), SimPO(), DDPO(), MDPO(distorted_images=2)):
        outside = RPO(inside)
        for name in (*Objective.__annotations__, "scale"):
            assert getattr(outside, name) == getattr(inside, name), name
        assert outside.terms({"text", "noise"}) == inside.terms({"text", "noise"})
    with pytest.raises(ValueError, match="objective: found 3, needed the _target_ of an objective"):
        RPO(3)


def test_mdpo_by_hand():
    """beta 0.1, delta 0.05: rewards 0.2 and -0.1, of y_w on the distorted image 0.1 * (-16 + 15) = -0.1.

    Response and image preference: margins 0.3, 0.5543552 each. Anchor: 0.15, 0.6209571. Together 1.7296675.
    Without text or noise dispreferences 1.1753123.
    """
    mdpo = MDPO(delta=0.05)
    policy, reference = (terms._replace(preferred_on_distorted=t(value)) for terms, value in zip(PAIR[:2], (-16, -15)))
    out = mdpo(policy, reference, NO_COUNTS)
    assert out.loss_B.item() == pytest.approx(1.7296675, abs=1e-7)
    assert out.rewards["noise"].item() == pytest.approx(-0.1)
    assert mdpo(*PAIR).loss_B.item() == pytest.approx(1.1753123, abs=1e-7)
    alone = mdpo(policy._replace(text=None), reference, NO_COUNTS)
    assert alone.loss_B.item() == pytest.approx(1.1753123, abs=1e-7) and "text" not in alone.rewards


def test_ddpo_weights_changed_tokens():
    """A red bus . / A blue big bus and dog . as 1 2 3 4 / 1 5 6 3 7 8 4: red and blue big are one segment in two
    wordings, and dog is a segment of one response alone.

    With matches of at least two tokens there are none, and everything is one changed segment.
    """
    one, other = [1, 2, 3, 4], [1, 5, 6, 3, 7, 8, 4]
    assert DDPO().token_weights(one, other) == ([1, 3, 1, 1], [1, 3, 3, 1, 3, 3, 1])
    assert DDPO(weight=5.0, one_sided=False).token_weights(one, other) == ([1, 5, 1, 1], [1, 5, 5, 1, 1, 1, 1])
    assert DDPO(shortest_match=2).token_weights(one, other) == ([3] * 4, [3] * 7)
    assert DDPO().token_weights(one, one) == ([1] * 4, [1] * 4)
    # A long response, of which difflib by itself would ignore the frequent tokens.
    long = [1, 2] * 150
    assert DDPO().token_weights(long, [*long[:-1], 9]) == ([1.0] * 299 + [3.0], [1.0] * 299 + [3.0])


def test_ddpo_marks_the_segments_of_rlaif_v():
    """What get_diff_ids of RLAIF-V's utils/diff_lib.py (min_match_size=3) returned for these two responses."""
    one = [7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19]
    other = [7, 8, 9, 10, 30, 12, 31, 14, 15, 16, 32, 33, 17, 18, 19, 40]
    weights = DDPO(weight=2.0, shortest_match=3, one_sided=False).token_weights(one, other)
    assert [[i for i, weight in enumerate(side) if weight == 2] for side in weights] == [[4, 5, 6], [4, 5, 6]]


def test_an_ablation_leaves_out_what_an_objective_can_do_without():
    assert POVID().terms({"text", "noise"}) == {"preferred", "text", "noise"}
    assert POVID().terms({"noise"}) == {"preferred", "noise"}
    assert Released().terms({"noise"}) == {"preferred", "noise_on_clean"}
    assert PreferredOnly().terms({"text", "noise"}) == {"preferred"}
    with pytest.raises(ValueError, match="DPO needs text dispreferences, and this stage has noise"):
        DPO().terms({"noise"})
    for objective in (IPO(), SimPO(), APOZero()):
        assert objective.terms({"text"}) == {"preferred", "text"}
        assert objective.terms({"noise"}) == {"preferred", "noise"}
        with pytest.raises(ValueError, match="needs noise or text dispreferences, and this stage has none"):
            objective.terms(set())
    assert MDPO().terms({"text"}) == {"preferred", "text"}
    assert MDPO().terms({"noise"}) == {"preferred", "preferred_on_distorted"}
    with pytest.raises(ValueError, match="DDPO needs text dispreferences, and this stage has noise"):
        RPO(DDPO()).terms({"noise"})


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
