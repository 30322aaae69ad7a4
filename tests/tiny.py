"""A random LLaVA of a few thousand parameters and a processor to go with it, for tests."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from povid.policy import LoraSettings, ModelSettings, Policy, load_processor
from povid.preferences.template import Template
from povid.preferences.triple import Triple, Turn

WORDS = ("A dog and cat sit on the mat near a red bus in town . Describe this image What is Is there Yes No it two "
         "three people walk with umbrella under tree beside blue car").split()


def save_tiny_llava(folder: Path, *, seed: int = 0, width: int = 32, layers: int = 2, image: int = 32) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from tokenizers.processors import TemplateProcessing
    from tokenizers.trainers import BpeTrainer
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>", "<image>"]
    bpe.train_from_iterator([" ".join(WORDS), "USER: ASSISTANT:"] * 3, BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    bpe.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
                                        extra_special_tokens={"image_token": "<image>"})
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": image}, crop_size={"height": image, "width": image}), tokenizer,
        patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1)
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(LlavaConfig(
        vision_config=CLIPVisionConfig(hidden_size=24, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
                                       image_size=image, patch_size=8),
        text_config=LlamaConfig(
            hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=4,
            vocab_size=len(tokenizer), max_position_embeddings=512, pad_token_id=2, bos_token_id=0,
            eos_token_id=1),
        image_token_id=3, vision_feature_layer=-2, vision_feature_select_strategy="default"))
    for name, parameter in model.named_parameters():  # the default init is too small for anything to differ
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3 if "embed" not in name else 1.0)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def settings(folder: Path, **changes) -> ModelSettings:
    values = {"name": "tiny", "path": str(folder), "dtype": "float32", "max_length": 128,
              "lora": LoraSettings(r=4, alpha=8, dropout=0.0), **changes}
    return ModelSettings(**values)


def load(folder: Path, *, adapted: bool = True, dtype: torch.dtype = torch.float32, perturb: bool = True, **changes
         ) -> tuple[Policy, Template]:
    """A policy whose adapter is not zero, so that policy and reference differ."""
    model_settings = settings(folder, **changes)
    torch.manual_seed(1)
    policy = Policy.load(model_settings, adapted=adapted)
    if adapted and perturb:
        for parameter in (p for group in policy.trained_parameters() for p in group):
            parameter.data += 0.05 * torch.randn_like(parameter)
    return policy.to(dtype), Template(load_processor(model_settings), style=model_settings.style,
                                      system=model_settings.system, pad_square=model_settings.pad_square,
                                      max_length=model_settings.max_length)


def picture(folder: Path, name: str, seed: int, size: tuple[int, int] = (40, 32)) -> Path:
    path = folder / f"{name}.png"
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    Image.fromarray(pixels.to(torch.uint8).numpy()).save(path)
    return path


def triple(name: str, image: Path, *turns: tuple[str, str, str]) -> Triple:
    """Each turn: question, preferred response, dispreferred response."""
    return Triple(name, image,
                  tuple(t for q, w, _ in turns for t in (Turn("user", q), Turn("assistant", w))),
                  tuple(t for q, _, l in turns for t in (Turn("user", q), Turn("assistant", l))))


def triples(folder: Path) -> list[Triple]:
    """Four records: short, long, multi-turn, and responses of wildly different length."""
    pictures = [picture(folder, f"p{i}", i) for i in range(4)]
    return [
        triple("short", pictures[0], ("Is there a dog", "Yes", "No")),
        triple("long", pictures[1], ("Describe this image.", "A dog and cat sit on the mat near a red bus in town.",
                                     "A dog and two people sit on the mat near a blue car.")),
        triple("turns", pictures[2], ("What is it", "A red bus", "A red car"), ("Is there a tree", "No", "Yes"),
               ("Describe this image.", "three people walk", "three people walk with umbrella under tree")),
        triple("uneven", pictures[3], ("Describe this image.", "A cat", "two cat and three dog walk near the blue bus "
                                       "beside a tree with umbrella and people sit on the red mat in town .")),
    ]
