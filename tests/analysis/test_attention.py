"""Figure 5: attention adds up, shares are sums by hand, and reading the same text twice changes nothing."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import tiny
import tiny_models
import torch

from povid.analysis.attention import SHARES, Look, look
from povid.model.question import Question
from povid.preferences.triple import Turn

STYLES = {"llava": "vicuna_v1", "instructblip": "bare"}
TEXT = "A dog and cat sit on the mat"


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    folder = functools.cache(lambda name: tiny_models.save(name, tmp_path_factory.mktemp(name)))
    return lambda name: tiny.load(
        folder(name), adapted=False, style=STYLES.get(name, "chat"), max_length=256, attention="eager"
    )


@pytest.fixture(scope="module")
def question(tmp_path_factory) -> Question:
    return Question("p", tiny.picture(tmp_path_factory.mktemp("pictures"), "p", 0, (32, 32)), "Describe this image.")


@pytest.mark.parametrize("name", ["llava", *tiny_models.MODELS])
def test_attention_is_that_of_transformers_and_adds_up(load, question, name):
    """Rows sum to 1; of models whose forward pass gives it, the attention is that of a plain call."""
    policy, template = load(name)
    found = look(policy.eval(), template, question, TEXT)
    layers, tokens, positions = found.rows_LUT.shape
    assert layers == 2 and tokens == len(found.tokens) and positions == len(found.kind_T)
    torch.testing.assert_close(found.rows_LUT.sum(-1), torch.ones(layers, tokens))
    torch.testing.assert_close(found.shares().sum(-1), torch.ones(layers))
    reaching = found.shares()[name == "gemma3" :]  # the window of its first layer does not reach back to the picture
    assert (reaching[:, :2] > 0).all()
    if name in ("llava", "qwen2_5_vl", "qwen3_vl", "gemma3"):
        (encoded,), images = template.encode(
            [(Turn("user", question.text), Turn("assistant", TEXT))], question.image, "p"
        )
        ids = torch.tensor([encoded.input_ids])
        with torch.no_grad():
            plain = policy.network(
                input_ids=ids, **policy.token_kinds(ids), **images, output_attentions=True
            ).attentions
        first = encoded.response.index(True)
        for layer, rows in zip(plain, found.rows_LUT, strict=True):
            expected = layer[0].mean(0)[first - 1 : first - 1 + tokens]
            torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-6)


def test_the_map_lies_on_the_picture(load, question):
    """LLaVA's 16 image tokens are 4 x 4 patches of a picture of 32 x 32; several tiles are no single picture."""
    policy, template = load("llava")
    found = look(policy.eval(), template, question, TEXT)
    assert "".join(found.tokens).strip() == f"{TEXT}</s>"
    assert found.picture.size == (32, 32) and found.grid().shape == (4, 4)
    assert found.grid().sum() == pytest.approx(found.shares()[:, SHARES.index("image")].mean().item(), rel=1e-5)
    policy, template = load("llava_next")
    tiles = look(policy.eval(), template, question, TEXT)
    assert tiles.picture is None and tiles.grid() is None


def test_shares_by_hand():
    """Two tokens over two image positions, one of the prompt and one of the response.

    Layer 1: image (0.1 + 0.2 + 0.3 + 0.1) / 2 = 0.35, prompt (0.7 + 0.2) / 2 = 0.45, response (0 + 0.4) / 2 = 0.2.
    """
    rows = torch.tensor([[[0.1, 0.7, 0.2, 0.0], [0.3, 0.2, 0.1, 0.4]], [[1.0, 0, 0, 0], [0, 0, 0, 1.0]]])
    shares = Look(rows, torch.tensor([0, 1, 0, 2]), ["a", "b"], None).shares()
    np.testing.assert_allclose(shares, [[0.35, 0.45, 0.2], [0.5, 0.0, 0.5]], atol=1e-6)
