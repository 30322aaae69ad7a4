"""Random models of a few thousand parameters, one for each architecture that is supported, and tokenizers for them."""

from __future__ import annotations

import json
from pathlib import Path

import tiny
import torch

CHAT = (  # what the chat templates of these models have in common, their special tokens left out
    "{{ bos_token }}{% for message in messages %}{{ '[' + message['role'] + ']' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ MARK }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{{ eos_token if message['role'] == 'assistant' else '' }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def chat(mark: str) -> str:
    return CHAT.replace("MARK", repr(mark))


def byte_level(special: list[str], **named: str):
    """A byte-level BPE tokenizer: <s> 0, </s> 1, <pad> 2, then ``special``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from tokenizers.processors import TemplateProcessing
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator(
        [" ".join(tiny.WORDS), "USER: ASSISTANT:"] * 3,
        BpeTrainer(
            vocab_size=380,
            special_tokens=["<s>", "</s>", "<pad>", *special],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bpe.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>", extra_special_tokens=named
    )


def llama(**options):
    """transformers' own Llama tokenizer on a small vocabulary: Metaspace, byte fallback, <s> 1, </s> 2; then <image>
    and <pad>."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from tokenizers.trainers import BpeTrainer
    from transformers import LlamaTokenizer

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Metaspace()
    bpe.train_from_iterator(
        [" ".join(tiny.WORDS), "USER : ASSISTANT :"] * 3, BpeTrainer(vocab_size=200, show_progress=False)
    )
    learnt = sorted(bpe.get_vocab(), key=bpe.get_vocab().get)
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learnt]
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    tokenizer = LlamaTokenizer(vocab={name: i for i, name in enumerate(names)}, merges=merges, **options)
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": AddedToken("<pad>", special=True, normalized=False)})
    return tokenizer


def text_config(vocabulary: int, kind: str = "llama", **changes):
    from transformers import LlamaConfig, Qwen2Config, Qwen3Config

    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": vocabulary,
        "max_position_embeddings": 1024,
        "pad_token_id": 2,
        "bos_token_id": 0,
        "eos_token_id": 1,
        **changes,
    }
    return {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}[kind](**shape)


def clip(image: int = 32):
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(
        hidden_size=24, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=image, patch_size=8
    )


def llava_vicuna():
    """LLaVA-1.5 as llava-hf lays it out: Llama's tokenizer, <image> and <pad> after its words, rows to spare."""
    from transformers import CLIPImageProcessorPil, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    tokenizer = llama()
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = LlavaProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    rows = -(-len(tokenizer) // 64) * 64
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=clip(),
            text_config=text_config(rows, bos_token_id=1, eos_token_id=2, pad_token_id=None),
            image_token_id=processor.image_token_id,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
        )
    ), processor


def llava_next():
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextProcessor
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    tokenizer, tiles = byte_level(["<image>"], image_token="<image>"), [[32, 64], [64, 32], [64, 64]]
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=tiles
    )
    processor = LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat("<image>"),
    )
    return LlavaNextForConditionalGeneration(
        LlavaNextConfig(
            vision_config=clip(),
            text_config=text_config(len(tokenizer)),
            image_token_index=3,
            image_grid_pinpoints=tiles,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
        )
    ), processor


def llava_onevision():
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, SiglipVisionConfig
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
    from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

    from povid.internals import without_video

    tokenizer, tiles = byte_level(["<image>", "<video>"], image_token="<image>"), [[32, 32], [32, 64], [64, 64]]
    images = LlavaOnevisionImageProcessorPil(size={"height": 32, "width": 32}, image_grid_pinpoints=tiles)
    processor = without_video(LlavaOnevisionProcessor)(
        images,
        tokenizer,
        None,
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=chat("<image>"),
    )
    vision = SiglipVisionConfig(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        vision_use_head=False,
    )
    return LlavaOnevisionForConditionalGeneration(
        LlavaOnevisionConfig(
            vision_config=vision,
            text_config=text_config(len(tokenizer), "qwen2"),
            image_token_index=3,
            video_token_index=4,
            image_grid_pinpoints=tiles,
        )
    ), processor


def qwen2_5_vl():
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from povid.internals import without_video

    special = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    tokenizer = byte_level(special, image_token=special[0])
    images = Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, size={"shortest_edge": 1024, "longest_edge": 4096})
    processor = without_video(Qwen2_5_VLProcessor)(
        images, tokenizer, None, chat_template=chat("<|vision_start|><|image_pad|><|vision_end|>")
    )
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": 8,
        "out_hidden_size": 32,
        "window_size": 32,
        "fullatt_block_indexes": [1],
    }
    text = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            vision_config=vision,
            text_config=text,
            image_token_id=3,
            video_token_id=4,
            vision_start_token_id=5,
            vision_end_token_id=6,
        )
    ), processor


def qwen3_vl():
    """With DeepStack: features of two layers of the tower besides its last."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from povid.internals import without_video

    special = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    tokenizer = byte_level(special, image_token=special[0])
    images = Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, size={"shortest_edge": 1024, "longest_edge": 4096})
    processor = without_video(Qwen3VLProcessor)(
        images, tokenizer, None, chat_template=chat("<|vision_start|><|image_pad|><|vision_end|>")
    )
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": 8,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
    }
    text = text_config(len(tokenizer), "qwen3", head_dim=8).to_dict() | {
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
    }
    text.pop("model_type")
    return Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(
            vision_config=vision,
            text_config=text,
            image_token_id=3,
            video_token_id=4,
            vision_start_token_id=5,
            vision_end_token_id=6,
        )
    ), processor


def gemma3():
    """With a sliding window shorter than a prompt in every other layer."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3Processor
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    named = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    tokenizer = byte_level(list(named.values()), **named)
    images = Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
    processor = Gemma3Processor(images, tokenizer, image_seq_length=4, chat_template=chat("<start_of_image>"))
    vision = {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
        "vision_use_head": False,
    }
    text = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 1024,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    model = Gemma3ForConditionalGeneration(
        Gemma3Config(
            vision_config=vision,
            text_config=text,
            image_token_index=3,
            boi_token_index=4,
            eoi_token_index=5,
            mm_tokens_per_image=4,
            tie_word_embeddings=False,
        )
    )
    for layer in model.get_decoder().layers:  # else scaled embeddings outweigh whatever the layers add
        for norm in (layer.post_attention_layernorm, layer.post_feedforward_layernorm):
            norm.weight.data += 4
    return model, processor


def smolvlm():
    """SmolVLM2, whose pictures are split into tiles."""
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration, SmolVLMProcessor
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    from povid.internals import without_video

    tokenizer = byte_level(
        ["<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>"], image_token="<image>"
    )
    images = SmolVLMImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    processor = without_video(SmolVLMProcessor)(images, tokenizer, None, image_seq_len=4, chat_template=chat("<image>"))
    vision = {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    return SmolVLMForConditionalGeneration(
        SmolVLMConfig(vision_config=vision, text_config=text_config(len(tokenizer)), image_token_id=3, scale_factor=2)
    ), processor


def idefics3():
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    tokenizer = byte_level(
        ["<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>"], image_token="<image>"
    )
    images = Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    processor = Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=chat("<image>"))
    vision = {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    return Idefics3ForConditionalGeneration(
        Idefics3Config(vision_config=vision, text_config=text_config(len(tokenizer)), image_token_id=3, scale_factor=2)
    ), processor


def internvl():
    """InternVL3.5: Qwen3 as its language model, pictures cut into up to four tiles and a thumbnail."""
    from transformers import InternVLConfig, InternVLForConditionalGeneration
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
    from transformers.models.internvl.processing_internvl import InternVLProcessor

    from povid.internals import without_video

    named = {
        "context_image_token": "<IMG_CONTEXT>",
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "video_token": "<video>",
    }
    tokenizer = byte_level(list(named.values()), **named)
    processor = without_video(InternVLProcessor)(
        GotOcr2ImageProcessorPil(size={"height": 32, "width": 32}, crop_to_patches=True, max_patches=4),
        tokenizer,
        None,
        image_seq_length=4,
        chat_template=chat("<IMG_CONTEXT>"),
    )
    vision = {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": [32, 32],
        "patch_size": [8, 8],
    }
    return InternVLForConditionalGeneration(
        InternVLConfig(
            vision_config=vision,
            text_config=text_config(len(tokenizer), "qwen3", head_dim=8),
            image_token_id=3,
            image_seq_length=4,
            tie_word_embeddings=False,
        )
    ), processor


def instructblip():
    from transformers import InstructBlipConfig, InstructBlipForConditionalGeneration, InstructBlipProcessor
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    tokenizer = byte_level(["<image>"])
    processor = InstructBlipProcessor(
        BlipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer, byte_level([]), num_query_tokens=4
    )
    vision = {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    qformer = {
        "vocab_size": 400,
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 2,
    }
    model = InstructBlipForConditionalGeneration(
        InstructBlipConfig(
            vision_config=vision,
            qformer_config=qformer,
            text_config=text_config(len(tokenizer)).to_dict(),
            num_query_tokens=4,
            image_token_index=3,
        )
    )
    torch.nn.init.normal_(model.query_tokens)
    return model, processor


MODELS = {
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "gemma3": gemma3,
    "smolvlm": smolvlm,
    "idefics3": idefics3,
    "internvl": internvl,
    "instructblip": instructblip,
}


def save(name: str, folder: Path, *, seed: int = 0) -> Path:
    """A random model with its processor; ``llava`` is the one of ``tiny``, ``llava_vicuna`` has Llama's tokenizer."""
    if name == "llava":
        return tiny.save_tiny_llava(folder, seed=seed)
    torch.manual_seed(seed)
    model, processor = (MODELS | {"llava_vicuna": llava_vicuna})[name]()
    for key, parameter in model.named_parameters():  # the default init is too small for anything to differ
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=1.0 if "embed" in key else 0.3)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
