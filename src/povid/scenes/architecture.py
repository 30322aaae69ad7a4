"""The embedded world's model: a LLaVA of 2.3 million parameters, its tokenizer and processor.

A picture of 96 x 96 pixels becomes 36 image tokens. Prompts read ``USER: <image>\\nQUESTION ASSISTANT: ANSWER</s>``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from povid.preferences.differences import plural
from povid.scenes.language import CAPTION_PROMPT, draw_caption, question
from povid.scenes.scene import BASE_PARTNER, SIDE, draw_scene
from povid.scenes.vocabulary import KINDS

FOLDER = Path(__file__).parent / "base"
PATCH = 16
VOCABULARY = 1024  # an upper bound: merging ends when every word of the world is one token
_SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]


def corpus() -> list[str]:
    """Every word and phrase of the world, for the tokenizer to learn from."""
    rng = np.random.default_rng(0)
    texts = [
        f"USER: \n{CAPTION_PROMPT} ASSISTANT: {draw_caption(rng, draw_scene(rng, BASE_PARTNER))}" for _ in range(300)
    ]
    for name, kind in KINDS.items():
        texts += [f"\n{question(name)} ASSISTANT: {answer}" for answer in ("Yes", "No")]
        texts += [f"the {word}, {number} {plural(word)}" for word in kind.names for number in ("two", "three")]
    return texts


def make_processor() -> LlavaProcessor:
    """Byte-level BPE learnt from the world's language, and CLIP's image processor for pictures of 96 pixels."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        corpus(),
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=_SPECIAL,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    pictures = CLIPImageProcessorPil(
        size={"height": SIDE, "width": SIDE},
        crop_size=SIDE,
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """The architecture with random weights: CLIP (d 160, 4 layers, patch 16) and Llama (d 128, 4 layers, tied)."""
    vision = CLIPVisionConfig(
        hidden_size=160,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=160,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        vision_feature_layer=-1,
        image_token_index=_SPECIAL.index("<image>"),
        vision_feature_select_strategy="default",
        image_seq_length=(SIDE // PATCH) ** 2,
        tie_word_embeddings=True,
    )
    config.pad_token_id = tokenizer.pad_token_id
    model = LlavaForConditionalGeneration(config)
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model
