"""A vision-language model with LoRA, and its reference.

Policy and reference are one network: the reference is the network without its adapter and with the projector that it
was loaded with. Shape suffixes: B = examples, T = positions, D = width, U = predicting positions, V = vocabulary.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from povid.fault import Fault
from povid.internals import (
    adapter_switches,
    attention_name,
    ignore_adapter,
    no_search_for_packing,
    trained_copies,
)
from povid.model.architectures import lora_targets
from povid.model.packing import Packed

if TYPE_CHECKING:
    from povid.model.loading import LocalModel, LoraSettings

log = logging.getLogger(__name__)


def add_lora(model: Any, lora: LoraSettings, projector: str | None = None) -> Any:
    """A peft model: a new LoRA on the language model's linear layers and, if named, a trained copy of the projector."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # declared int, used as a number
        lora_dropout=lora.dropout,
        bias="none",
        target_modules=lora_targets(model),
        modules_to_save=[projector] if projector else None,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


class Policy(nn.Module):
    """A vision-language model with a new trainable adapter, or without one (``adapted=False``, for evaluation).

    A new adapter changes nothing, so that training starts from the reference.

    Raises:
        Fault: the projector is to be trained and the model's architecture does not say which module that is.
    """

    def __init__(self, model: Any, processor: Any, settings: LocalModel, *, adapted: bool) -> None:
        super().__init__()
        self.settings, self.processor = settings, processor
        self.model_type = model.config.model_type
        self.architecture = settings.architecture_for(self.model_type)
        self.packable = self.architecture.packable
        if not self.packable:
            _warn_that_packing_is_off(settings.name, self.model_type)
        self.adapted = adapted
        self.model: Any = self._adapt(model) if adapted else model
        self._switches = adapter_switches(self.model)
        if settings.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})

    @property
    def network(self) -> Any:
        """The transformers model, adapter layers inside it."""
        return self.model.get_base_model() if self.adapted else self.model

    def _adapt(self, model: Any) -> Any:
        projector = self.architecture.projector if self.settings.train_projector else None
        if self.settings.train_projector and projector is None:
            raise Fault(
                f"model {self.settings.name!r}: the projector of {self.model_type!r} models is not known; set "
                "model.train_projector=false, or name it with model.architecture={projector: NAME}"
            )
        adapted = add_lora(model, self.settings.lora, projector)
        for module in trained_copies(adapted):
            _train_in_float32(module)
        if self.settings.fused:
            from povid.model.fused import fuse  # imports transformers and peft, which takes seconds

            fuse(model)
        return adapted

    def train(self, mode: bool = True) -> Policy:
        """Training mode. Of all dropouts only LoRA's is active, so that the reference stays a function of its input."""
        from transformers.modeling_layers import GradientCheckpointingLayer

        super().train(mode)
        for name, module in self.network.named_modules():
            recomputed = self.settings.gradient_checkpointing and isinstance(module, GradientCheckpointingLayer)
            module.training = mode and ("lora_dropout" in name or recomputed)
        return self

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the network is the reference: adapter off, original projector, no gradient."""
        with torch.no_grad():
            ignore_adapter(self._switches, True)
            try:
                yield
            finally:
                ignore_adapter(self._switches, False)

    def trained_parameters(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """(LoRA's parameters, the projector's)."""
        named = [(name, p) for name, p in self.network.named_parameters() if p.requires_grad]
        projector = [p for name, p in named if "modules_to_save" in name]
        return [p for name, p in named if "modules_to_save" not in name], projector

    def save_adapter(self, folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """Write the adapter in peft's format. ``weights``: the gathered weights of a policy split over devices."""
        self.model.save_pretrained(str(folder), state_dict=weights)

    # --- scoring ---------------------------------------------------------------------------------------------------

    def look(self, images: Mapping[str, Tensor]) -> Any:
        """What the frozen vision tower makes of images, computed once for policy and reference.

        LLaVA-1.5: features [B, P, D_vision] of the layer that is read, without the class token. Other models: image
        embeddings or, where the projector is trained or sequences cannot be packed, the images as they are.
        """
        if not images or not self.packable:
            return images
        if self._reads_one_clip_layer:
            with torch.no_grad():
                return self._clip_features(images["pixel_values"])
        if self.settings.train_projector and self.adapted:
            return images
        with torch.no_grad():
            return self._image_embeds(images)

    @property
    def _reads_one_clip_layer(self) -> bool:
        if not self.architecture.clip_layer:
            return False
        layer, tower = self.network.config.vision_feature_layer, self.network.model.vision_tower
        return isinstance(layer, int) and hasattr(tower, "pre_layrnorm")

    def _clip_features(self, pixels: Tensor) -> Tensor:
        """The CLIP tower up to the layer that is read."""
        config, tower = self.network.config, self.network.model.vision_tower
        layer = config.vision_feature_layer
        count = layer if layer >= 0 else len(tower.encoder.layers) + 1 + layer
        hidden = tower.pre_layrnorm(tower.embeddings(pixels.to(tower.dtype)))
        for block in tower.encoder.layers[:count]:
            hidden = block(hidden, None)
        return hidden[:, 1:] if config.vision_feature_select_strategy == "default" else hidden

    def _image_embeds(self, images: Mapping[str, Tensor]) -> Tensor:
        embeds = self.network.get_image_features(**images).pooler_output
        return embeds if isinstance(embeds, Tensor) else torch.cat(list(embeds))

    def embed(self, input_ids_BT: Tensor, seen: Any) -> Tensor:
        """Token embeddings, the image's in place of the image tokens, [B, T, D]. ``seen`` is {} without images."""
        embeds_BTD = self.network.get_input_embeddings()(input_ids_BT)
        if isinstance(seen, Mapping):
            if not seen:
                return embeds_BTD
            image = self._image_embeds(seen)
        elif self._reads_one_clip_layer:
            image = self.network.model.multi_modal_projector(seen)
        else:
            image = seen
        # Not masked_scatter, in whose backward pass the host waits for the device to count the image tokens.
        place_BT = input_ids_BT == self.network.config.image_token_id
        row_BT = (place_BT.flatten().cumsum(0) - 1).clamp(min=0).view_as(input_ids_BT)
        image_BTD = image.to(embeds_BTD.dtype).flatten(0, -2)[row_BT]
        return torch.where(place_BT[..., None], image_BTD, embeds_BTD)

    def predict(self, packed: Packed, seen: Any) -> Tensor:
        """Logits [U, V] at the positions that predict response tokens, and nowhere else.

        ``seen`` is what ``look`` returned.
        """
        from povid.model.fused import predicting_rows  # imports transformers and peft, which takes seconds

        if not self.packable:
            return self._predict_unpacked(packed, seen)
        decoder, embeds_BTD = self.network.get_decoder(), self.embed(packed.input_ids_BT, seen)
        # Without a mask sdpa takes a faster kernel; other implementations may need the mask nevertheless.
        free = packed.causal and attention_name(self.network.config.get_text_config()) == "sdpa"
        with predicting_rows(decoder, packed) as place_U, no_search_for_packing():
            hidden_BUD = decoder(
                inputs_embeds=embeds_BTD,
                use_cache=False,
                attention_mask=None if free else packed.additive_attention(embeds_BTD.dtype),
                position_ids=None if free else packed.position_ids_BT,
            ).last_hidden_state
        return self.network.get_output_embeddings()(hidden_BUD[packed.example_U, place_U])

    def _predict_unpacked(self, packed: Packed, images: Mapping[str, Tensor]) -> Tensor:
        """``predict`` for models whose sequences cannot be packed: whole sequences through the whole model."""
        inputs = {"input_ids": packed.input_ids_BT, "attention_mask": (packed.segment_BT >= 0).long(), **images}
        inputs |= self.token_kinds(packed.input_ids_BT)
        hidden_BTD = self.network.model(**inputs, use_cache=False).last_hidden_state
        return self.network.get_output_embeddings()(hidden_BTD[packed.example_U, packed.column_U])

    def token_kinds(self, input_ids_BT: Tensor) -> dict[str, Tensor]:
        """The input ``mm_token_type_ids`` (1: image, 0: text) of models that need it, such as Qwen2.5-VL."""
        if "mm_token_type_ids" not in inspect.signature(self.network.forward).parameters:
            return {}
        return {"mm_token_type_ids": (input_ids_BT == self.network.config.image_token_id).int()}


@functools.cache  # once per model
def _warn_that_packing_is_off(name: str, model_type: str) -> None:
    log.warning("%s: sequences of %r models cannot be packed; scoring them one by one is slower", name, model_type)


def _train_in_float32(module: nn.Module) -> None:
    """Keep a module's weights in float32 inside a model of fewer bits, which would round steps of 2e-5 away."""
    outside = next(module.parameters()).dtype
    if outside not in (torch.bfloat16, torch.float16):
        return
    module.float()
    module.register_forward_pre_hook(
        lambda _, inputs: tuple(
            value.float() if isinstance(value, Tensor) and value.is_floating_point() else value for value in inputs
        )
    )
    module.register_forward_hook(lambda _, inputs, output: output.to(outside))
