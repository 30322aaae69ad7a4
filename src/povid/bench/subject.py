"""The measured model and data: random weights in a model's proportions, random words, random pictures."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import torch
from torch import nn

from povid.method.distortions.diffusion import Diffusion
from povid.method.objectives.povid import POVID
from povid.model.loading import Dtype, LocalModel, LoraSettings
from povid.model.policy import Policy
from povid.model.template import Template
from povid.preferences.triple import Triple, Turn
from povid.training.datamodule import Example, PreferenceBatch, PreferenceDataset, collate


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a LLaVA and of its examples (counts in tokens; ``response`` includes the end token)."""

    name: str
    width: int
    layers: int
    heads: int
    inner: int
    vocabulary: int
    vision_width: int
    vision_layers: int
    vision_heads: int
    patch: int
    lora: int
    prompt: int
    response: int
    pixels: int = 336
    dtype: Dtype = "float32"

    @property
    def image_tokens(self) -> int:
        return (self.pixels // self.patch) ** 2


SHAPES = {
    # The 7B model's proportions at a four-hundredth of its work per token: head 4 %, vision 4.5 %, adapter 4.8 %.
    "proportional": Shape("proportional", 256, 8, 8, 688, 1000, 64, 6, 4, 28, 8, 15, 25),
    # LLaVA-1.5-7B: 7,063,427,072 parameters.
    "llava_1_5_7b": Shape("llava_1_5_7b", 4096, 32, 32, 11008, 32064, 1024, 24, 16, 14, 128, 60, 100, dtype="bfloat16"),
    # For tests of the benchmark itself.
    "smallest": Shape("smallest", 32, 2, 4, 64, 100, 24, 3, 2, 112, 4, 8, 6),
}


def build_model(shape: Shape, *, device: str, seed: int = 0) -> nn.Module:
    """A frozen LLaVA with random weights (no download), made on the device."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=shape.vision_width,
            intermediate_size=4 * shape.vision_width,
            patch_size=shape.patch,
            num_hidden_layers=shape.vision_layers,
            num_attention_heads=shape.vision_heads,
            image_size=shape.pixels,
            projection_dim=shape.vision_width,
        ),
        text_config=LlamaConfig(
            hidden_size=shape.width,
            intermediate_size=shape.inner,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            vocab_size=shape.vocabulary,
            max_position_embeddings=4096,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        ),
        image_token_index=3,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, shape.dtype))
    try:
        with torch.device(device):
            model = LlavaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    return model.requires_grad_(False)


def build_processor(shape: Shape) -> Any:
    """A tokenizer of one word per token and CLIP's image processor."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from tokenizers.processors import TemplateProcessing
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    words = ["<s>", "</s>", "<pad>", "<image>", "USER:", "ASSISTANT:"]
    words += [f"w{i}" for i in range(shape.vocabulary - len(words))]
    bare = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bare.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bare,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )
    pictures = CLIPImageProcessor(
        size={"shortest_edge": shape.pixels}, crop_size={"height": shape.pixels, "width": shape.pixels}
    )
    return LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=shape.patch,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
    )


def adapt(model: nn.Module, processor: Any, shape: Shape, *, fused: bool = True, seed: int = 1) -> Policy:
    """A policy on the model whose adapter is not zero, so that policy and reference differ. Dropout is off.

    ``fused=False`` leaves the modules as transformers and peft made them (see ``povid.model.fused``).
    """
    settings = LocalModel(
        name=shape.name,
        path=shape.name,
        dtype=shape.dtype,
        max_length=4096,
        fused=fused,
        lora=LoraSettings(r=shape.lora, alpha=2 * shape.lora, dropout=0.0),
    )
    torch.manual_seed(seed)
    policy = Policy(model, processor, settings, adapted=True)
    generator = torch.Generator().manual_seed(seed)
    for parameter in (p for group in policy.trained_parameters() for p in group):
        parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return policy.train()


def twin(model: nn.Module) -> nn.Module:
    """Another network on the same frozen weights, for a library that changes the network that it is given."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def photograph(pixels: tuple[int, int], seed: int) -> bytes:
    """A JPEG with the detail of a photograph: coarse shapes and fine noise."""
    from PIL import Image

    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 12, 12, generator=generator)
    picture = nn.functional.interpolate(coarse, size=pixels[::-1], mode="bicubic")[0]
    picture = (picture + 0.05 * torch.randn(picture.shape, generator=generator)).clamp(0, 1)
    file = BytesIO()
    Image.fromarray((picture.permute(1, 2, 0) * 255).to(torch.uint8).numpy()).save(file, "JPEG", quality=90)
    return file.getvalue()


def triples(shape: Shape, count: int, *, pixels: tuple[int, int] | None = None, seed: int = 0) -> list[Triple]:
    """Random records; preferred and dispreferred responses share nothing, which is the worst case for packing."""
    generator = torch.Generator().manual_seed(seed)

    def words(number: int) -> str:
        drawn = torch.randint(0, shape.vocabulary - 6, (number,), generator=generator)
        return " ".join(f"w{i}" for i in drawn.tolist())

    made = []
    for i in range(count):
        asked = Turn("user", words(shape.prompt - 3))  # with <s>, USER: and ASSISTANT:
        preferred, dispreferred = ((asked, Turn("assistant", words(shape.response - 1))) for _ in range(2))
        picture = photograph(pixels or (shape.pixels, shape.pixels), seed + i)
        made.append(Triple(f"record {i}", picture, preferred, dispreferred))
    return made


def template_for(processor: Any) -> Template:
    return Template(processor, system="", max_length=4096)


@dataclass(frozen=True, slots=True)
class Step:
    """The data of one step, the same for every arm."""

    examples: Sequence[Example]
    text: PreferenceBatch  # stage 1
    both: PreferenceBatch  # stage 2


def paper_noise() -> Diffusion:
    """Eq. 4 with the schedule of appendix A.1."""
    from diffusers import DDPMScheduler

    scheduler: Any = DDPMScheduler(beta_schedule="sigmoid", beta_start=1e-5, beta_end=5e-3)
    return Diffusion(scheduler)


def steps(shape: Shape, processor: Any, *, count: int, batch_size: int, device: str) -> list[Step]:
    """Batches on the device. The noise draw is the same for every arm."""
    dataset = PreferenceDataset(triples(shape, count * batch_size), template_for(processor), paper_noise(), seed=0)
    made = []
    for start in range(0, len(dataset), batch_size):
        examples = [dataset[i, 0] for i in range(start, start + batch_size)]
        examples = [e._replace(images=_to(e.images, device), noised=_to(e.noised, device)) for e in examples]
        both = collate(examples, POVID.needs, packable=True, padding_id=2)
        made.append(Step(examples, _to(both._replace(preferred=None, noised=None), device), _to(both, device)))
    return made


def _to(entry: Any, device: str) -> Any:
    from lightning.fabric.utilities import move_data_to_device

    return move_data_to_device(entry, device)
