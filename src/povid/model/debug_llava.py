"""A small LLaVA-1.5 with random weights, to try data, disks and clusters without a download.

It has every part of LLaVA-1.5-7B (a CLIP tower whose second-last layer is read, a two-layer projector, a Llama with
untied embeddings, image token, processor). Its answers are noise.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from povid.files import draft

VOCABULARY = 512
SPECIAL = {"<s>": 0, "</s>": 1, "<pad>": 2, "<image>": 3}
WORDS = (
    "USER: ASSISTANT: A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. Describe this image in detail. What is in the "
    "picture? There are two people, one man and a woman, next to a red car on the street with trees behind them. "
    "Is there a dog? Yes, there is. No, there is not. The sky is blue and clear, the table is white."
)


def prepare(
    folder: Path | str,
    *,
    seed: int = 0,
    image: int = 336,
    patch: int = 14,
    width: int = 64,
    layers: int = 4,
    vision_width: int = 64,
    vision_layers: int = 4,
    positions: int = 2048,
    words: Iterable[str] = (WORDS,),
    spread: float | None = None,
) -> Path:
    """Write model and processor to ``folder`` unless they are there, and return ``folder``.

    Args:
        seed: of the weights.
        image, patch: sides of the picture and of a patch in pixels; they make (image / patch)^2 image tokens.
        width, layers: of the language model.
        vision_width, vision_layers: of the vision tower.
        positions: longest sequence in tokens.
        words: texts from which the byte-level BPE of 512 tokens is learnt.
        spread: standard deviation of the weights (1 for embeddings); None for transformers' own initialisation.
    """
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    folder = Path(folder)
    if (folder / "config.json").exists():
        return folder
    processor = debug_processor(words, image, patch)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=vision_width,
            intermediate_size=4 * vision_width,
            num_hidden_layers=vision_layers,
            num_attention_heads=2,
            image_size=image,
            patch_size=patch,
        ),
        text_config=LlamaConfig(
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            vocab_size=len(processor.tokenizer),
            max_position_embeddings=positions,
            pad_token_id=SPECIAL["<pad>"],
            bos_token_id=SPECIAL["<s>"],
            eos_token_id=SPECIAL["</s>"],
            tie_word_embeddings=False,
        ),
        image_token_index=SPECIAL["<image>"],
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
        if spread is not None:
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:
                    torch.nn.init.normal_(parameter, std=spread if "embed" not in name else 1.0)
    with draft(folder, replace=False) as place:  # another process may write the same weights
        model.save_pretrained(place)
        processor.save_pretrained(place)
    return folder


def debug_processor(words: Iterable[str], image: int, patch: int) -> Any:
    """A LLaVA processor with a byte-level BPE tokenizer learnt from ``words``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from tokenizers.processors import TemplateProcessing
    from tokenizers.trainers import BpeTrainer
    from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator(
        [text for text in words for _ in range(3)],
        BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=list(SPECIAL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bpe.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", SPECIAL["<s>"])])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )
    return LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": image}, crop_size={"height": image, "width": image}),
        tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
