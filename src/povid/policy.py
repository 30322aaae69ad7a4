"""A vision-language model with LoRA, its reference, and its adapter files.

Policy and reference are one network: the reference is the network without its adapter, with the projector that it was
loaded with. Shape suffixes: B = examples, T = positions, D = width, U = predicting positions, V = vocabulary.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from povid.fault import Fault
from povid.packing import Packed

log = logging.getLogger(__name__)

# What differs between models: where the projector is, and whether the language model takes a packed sequence (plain
# one-dimensional positions and a free 4-D mask). Models that are not here are trained the plain way.
PROJECTORS = {
    "llava": "multi_modal_projector",
    "llava_next": "multi_modal_projector",
    "llava_onevision": "multi_modal_projector",
}
PACKABLE = frozenset(PROJECTORS)


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """LoRA on every linear layer of the language model, its head excepted (Table 5: r 128, alpha 256, target all)."""

    r: int = 128
    alpha: int = 256
    dropout: float = 0.05


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """A policy to load.

    Args:
        name: its name in results; path: folder or hub id (``package:NAME`` is a folder shipped inside povid).
        dtype: of the frozen weights; template, system, pad_square, max_length: see ``Template``.
        lora: adapter; train_projector: whether the projector is trained too.
        attention: transformers' attn_implementation, None for its own choice.
        gradient_checkpointing: recompute activations in the backward pass.
    """

    name: str
    path: str
    dtype: str = "bfloat16"
    style: str = "vicuna_v1"
    system: str = ""
    pad_square: bool = False
    max_length: int = 1024
    train_projector: bool = True
    attention: str | None = None
    gradient_checkpointing: bool = False
    lora: LoraSettings = field(default_factory=LoraSettings)

    @property
    def source(self) -> str:
        if self.path.startswith("package:"):
            return str(Path(__file__).parent / self.path.removeprefix("package:"))
        return self.path


def load_processor(settings: ModelSettings) -> Any:
    """The model's processor; batched generation needs left padding whatever was saved with it."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(settings.source)
    processor.tokenizer.padding_side = "left"
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return processor


def load_model(settings: ModelSettings, adapters: Sequence[Path] = ()) -> nn.Module:
    """The frozen model with earlier adapters merged into it, in their order.

    Raises:
        Fault: the weights cannot be found, or an adapter folder holds no adapter.
    """
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    options = {"attn_implementation": settings.attention} if settings.attention else {}
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            settings.source, dtype=getattr(torch, settings.dtype), **options
        )
    except OSError as error:
        raise Fault(f"model {settings.name!r}: {settings.source!r} could not be loaded ({str(error).splitlines()[0]}); "
                    "set model.path to a folder with its weights, or log in and go online so that they can be "
                    "downloaded") from error
    for adapter in adapters:
        if not (adapter / "adapter_config.json").exists():
            raise Fault(f"{adapter} holds no adapter_config.json; point init_from at a run folder or adapter folder")
        model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    return model.requires_grad_(False)


def lora_targets(model: nn.Module) -> str:
    """Pattern of the full names of the linear layers in the language model, and of nothing in the vision tower."""
    decoder = model.get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    leaves = {name.rpartition(".")[2] for name, module in decoder.named_modules() if isinstance(module, nn.Linear)}
    return rf"{re.escape(prefix)}\..*\.({'|'.join(sorted(leaves))})"


class Policy(nn.Module):
    """A vision-language model, optionally with a trainable adapter.

    ``adapted=False`` gives the model as it is (for evaluation); otherwise a fresh adapter is put on it, so that it
    starts as its own reference.
    """

    def __init__(self, model: nn.Module, processor: Any, settings: ModelSettings, *, adapted: bool) -> None:
        super().__init__()
        self.settings, self.processor = settings, processor
        self.model_type = model.config.model_type
        self.packable = self.model_type in PACKABLE
        if not self.packable:
            log.warning("%s: sequences of %r models cannot be packed; they are scored one by one, which is slower",
                        settings.name, self.model_type)
        self.adapted = adapted
        self.model = self._adapt(model) if adapted else model
        if settings.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})

    @property
    def network(self) -> nn.Module:
        """The transformers model, adapter layers inside it."""
        return self.model.get_base_model() if self.adapted else self.model

    @classmethod
    def load(cls, settings: ModelSettings, *, adapters: Sequence[Path] = (), adapted: bool) -> Policy:
        """Weights from disk or hub, earlier adapters merged, and a new adapter if ``adapted``."""
        return cls(load_model(settings, adapters), load_processor(settings), settings, adapted=adapted)

    def _adapt(self, model: nn.Module) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        lora = self.settings.lora
        saved = None
        if self.settings.train_projector:
            if self.model_type not in PROJECTORS:
                raise Fault(f"model {self.settings.name!r}: the projector of {self.model_type!r} models is not known; "
                            "set model.train_projector=false")
            saved = [PROJECTORS[self.model_type]]
        return get_peft_model(model, LoraConfig(
            r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, bias="none",
            target_modules=lora_targets(model), modules_to_save=saved, task_type="CAUSAL_LM",
        ))

    def train(self, mode: bool = True) -> Policy:
        """Training mode; of all dropouts LoRA's alone is active, so that the reference stays one function."""
        super().train(mode)
        for name, module in self.named_modules():
            if isinstance(module, nn.Dropout) and "lora_dropout" not in name:
                module.eval()
        return self

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the network is the reference: adapter off, original projector, no gradient."""
        with torch.no_grad(), self.model.disable_adapter():
            yield

    def trained_parameters(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """(LoRA's parameters, the projector's)."""
        named = [(name, p) for name, p in self.network.named_parameters() if p.requires_grad]
        projector = [p for name, p in named if "modules_to_save" in name]
        return [p for name, p in named if "modules_to_save" not in name], projector

    def save_adapter(self, folder: Path) -> None:
        """peft's own format."""
        self.model.save_pretrained(str(folder))

    # --- scoring ---------------------------------------------------------------------------------------------------

    def look(self, images: Mapping[str, Tensor]) -> Any:
        """What the frozen vision tower sees, computed once for policy and reference.

        LLaVA: features [B, P, D_vision] of the layer that is read, without class token. Other models: the image
        embeddings themselves or, if their projector is trained or they are scored the plain way, the untouched images.
        """
        if not self.packable:
            return images
        if self.model_type == "llava":
            with torch.no_grad():
                return self._llava_features(images["pixel_values"])
        if self.settings.train_projector and self.adapted:
            return images
        with torch.no_grad():
            return self._image_embeds(images)

    def _llava_features(self, pixels: Tensor) -> Tensor:
        """Layers of the CLIP tower up to the one that is read, and not one more."""
        config, tower = self.network.config, self.network.model.vision_tower
        layer = config.vision_feature_layer
        if not isinstance(layer, int) or not hasattr(tower, "pre_layrnorm"):
            raise Fault(f"model {self.settings.name!r}: a LLaVA with vision_feature_layer={layer!r} on "
                        f"{type(tower).__name__} is not supported; use one that reads one layer of a CLIP tower")
        count = layer if layer >= 0 else len(tower.encoder.layers) + 1 + layer
        hidden = tower.pre_layrnorm(tower.embeddings(pixels.to(tower.dtype)))
        for block in tower.encoder.layers[:count]:
            hidden = block(hidden, None)
        return hidden[:, 1:] if config.vision_feature_select_strategy == "default" else hidden

    def _image_embeds(self, images: Mapping[str, Tensor]) -> Tensor:
        embeds = self.network.get_image_features(**images).pooler_output
        return embeds if isinstance(embeds, Tensor) else torch.cat(list(embeds))

    def embed(self, input_ids_BT: Tensor, seen: Any) -> Tensor:
        """Token embeddings with the image's in the places of the image tokens, [B, T, D]."""
        embeds_BTD = self.network.get_input_embeddings()(input_ids_BT)
        if isinstance(seen, Mapping):
            image = self._image_embeds(seen)
        elif self.model_type == "llava":
            image = self.network.model.multi_modal_projector(seen)
        else:
            image = seen
        place = (input_ids_BT == self.network.config.image_token_id)[..., None]
        return embeds_BTD.masked_scatter(place, image.to(embeds_BTD.dtype))

    def predict(self, packed: Packed, seen: Any) -> Tensor:
        """Logits [U, V] at the positions from which response tokens are predicted, and nowhere else.

        ``seen`` is what ``look`` returned.
        """
        if not self.packable:
            return self._predict_plain(packed, seen)
        mask = packed.attention()
        if self.network.config.get_text_config()._attn_implementation != "sdpa":
            dtype = next(self.network.parameters()).dtype
            mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
        hidden_BTD = self.network.get_decoder()(
            inputs_embeds=self.embed(packed.input_ids_BT, seen), attention_mask=mask,
            position_ids=packed.position_ids_BT, use_cache=False,
        ).last_hidden_state
        return self.network.get_output_embeddings()(hidden_BTD[packed.example_U, packed.column_U])

    def _predict_plain(self, packed: Packed, images: Mapping[str, Tensor]) -> Tensor:
        """The same for models whose sequences cannot be packed: whole rows through the whole model, [U, V]."""
        inputs = {"input_ids": packed.input_ids_BT, "attention_mask": (packed.segment_BT >= 0).long(), **images}
        if "mm_token_type_ids" in self.network.forward.__code__.co_varnames:
            inputs["mm_token_type_ids"] = (packed.input_ids_BT == self.network.config.image_token_id).int()
        hidden_BTD = self.network.model(**inputs, use_cache=False).last_hidden_state
        return self.network.get_output_embeddings()(hidden_BTD[packed.example_U, packed.column_U])
