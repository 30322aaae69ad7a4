"""LLaVA-1.5 at its real size, on the meta device: no weights are made."""

from __future__ import annotations

import re

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from povid.model.architectures import KNOWN, lora_targets

SIZES = {  # width, inner width, layers, heads of llava-hf/llava-1.5-{7b,13b}-hf
    "7b": (4096, 11008, 32, 32),
    "13b": (5120, 13824, 40, 40),
}


def build(size: str) -> nn.Module:
    width, inner, layers, heads = SIZES[size]
    with torch.device("meta"):
        return LlavaForConditionalGeneration(
            LlavaConfig(
                vision_config=CLIPVisionConfig(
                    hidden_size=1024,
                    intermediate_size=4096,
                    num_hidden_layers=24,
                    num_attention_heads=16,
                    image_size=336,
                    patch_size=14,
                ),
                text_config=LlamaConfig(
                    vocab_size=32064,
                    hidden_size=width,
                    intermediate_size=inner,
                    num_hidden_layers=layers,
                    num_attention_heads=heads,
                ),
                image_token_id=32000,
                vision_feature_layer=-2,
            )
        )


def count(module: nn.Module, *, trained: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def adapted(model: nn.Module, saved: list[str] | None) -> nn.Module:
    with torch.device("meta"):
        return get_peft_model(
            model,
            LoraConfig(
                r=128, lora_alpha=256, target_modules=lora_targets(model), modules_to_save=saved, task_type="CAUSAL_LM"
            ),
        )


def test_llava_1_5_7b():
    model = build("7b")
    assert count(model) == 7_063_427_072
    assert count(model.model.vision_tower) == 303_507_456
    assert count(model.model.multi_modal_projector) == 20_979_712
    assert count(model.get_decoder()) == 6_607_605_760
    assert count(model.lm_head) == 131_334_144


def test_llava_1_5_13b():
    """Projector 1024 x 5120 + 5120 + 5120 x 5120 + 5120 = 31,467,520; each layer 4 x 5120^2 + 3 x 5120 x 13824 +
    2 x 5120 = 317,204,480; 40 of them, 32064 x 5120 twice and the last norm's 5120: 13,016,519,680 in all; the tower
    has 303,507,456."""
    model = build("13b")
    assert count(model.model.multi_modal_projector) == 31_467_520
    assert count(model.get_decoder()) + count(model.lm_head) == 40 * 317_204_480 + 2 * 32064 * 5120 + 5120
    assert count(model) == 303_507_456 + 31_467_520 + 13_016_519_680


def test_lora_of_rank_128():
    assert count(adapted(build("7b"), None), trained=True) == 319_815_680
    assert count(adapted(build("7b"), [KNOWN["llava"].projector]), trained=True) == 340_795_392


def test_lora_of_the_13b_model():
    """Per layer and rank: 4 projections of 5120 + 5120 and 3 of 5120 + 13824 make 97,792; times 40 times 128."""
    assert count(adapted(build("13b"), None), trained=True) == 97_792 * 40 * 128


def test_targets_are_the_seven_projections_of_the_language_model_and_nothing_else():
    model = build("7b")
    hit = [name for name, _ in model.named_modules() if re.fullmatch(lora_targets(model), name)]
    assert len(hit) == 7 * 32 and all(name.startswith("model.language_model.layers.") for name in hit)
