"""A vision-language model with LoRA, and its reference.

Policy and reference are one network: the reference is the network without its adapter and with the projector that it
was loaded with. Shape suffixes: B = examples, T = positions, D = width, N = image tokens of a batch, U = predicting
positions, V = vocabulary.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from povid.fault import Fault
from povid.internals import (
    adapter_switches,
    attention_name,
    compiled,
    ignore_adapter,
    no_search_for_packing,
    run_compiled,
    trained_copies,
)
from povid.model.architectures import FULL, SLIDING, layer_kinds, lora_targets, sliding_window
from povid.model.packing import PADDING, Packed, additive

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


class Visual(NamedTuple):
    """What the language model is given of pictures: an embedding for each image token, [N, D], in their order.

    ``deep_ND``: what is added to the image tokens after the first layer, the second and so on (DeepStack, Qwen3-VL).
    """

    embeds_ND: Tensor
    deep_ND: Sequence[Tensor] = ()


class Seen(NamedTuple):
    """A batch's pictures: the processor's tensors, and what has been computed of them for policy and reference alike.

    ``computed``: the features [B, P, D_vision] of a CLIP tower (LLaVA-1.5), a :class:`Visual`, or None.
    """

    images: Mapping[str, Tensor]
    computed: Tensor | Visual | None = None


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
        self.packable = self.architecture.packs(model.config.get_text_config())
        if not self.packable:
            _warn_that_packing_is_off(settings.name, self.model_type)
        self.adapted = adapted
        self.model: Any = self._adapt(model) if adapted else model
        self._switches = adapter_switches(self.model)
        self._compiled = [(layer, compiled(layer)) for layer in self._layers()] if settings.compile and adapted else []
        self._run_compiled(False)
        self.recomputes = False
        if settings.gradient_checkpointing:
            self.recompute(True)

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
            from povid.model.fused import FUSED, fuse  # imports transformers and peft, which takes seconds

            if self.settings.fused == "liger":
                from povid.model.liger import LIGER

                fuse(model, LIGER)
            else:
                fuse(model, FUSED)
        return adapted

    def recompute(self, on: bool) -> None:
        """Gradient checkpointing from the next ``train()`` on: activations are computed again in the backward pass.

        It changes no digit of a number: the same operations run again on the same values, with the same dropout.
        """
        if on:
            self.network.gradient_checkpointing_enable({"use_reentrant": False})
        elif self.recomputes:
            self.network.gradient_checkpointing_disable()
        self.recomputes = on

    def train(self, mode: bool = True) -> Policy:
        """Training mode. Of all dropouts only LoRA's is active, so that the reference stays a function of its input."""
        from transformers.modeling_layers import GradientCheckpointingLayer

        super().train(mode)
        self._run_compiled(mode)
        for name, module in self.network.named_modules():
            module.training = mode and "lora_dropout" in name
            if mode and self.recomputes and isinstance(module, GradientCheckpointingLayer):
                module.training = True  # else transformers would keep its activations
                for own in [
                    name for name, value in vars(module).items() if "drop" in name and isinstance(value, float)
                ]:
                    setattr(module, own, 0.0)  # what some layers drop by themselves in training mode
        return self

    def _layers(self) -> list[nn.Module]:
        """The decoder's layers, the only ones that are compiled: each kind once, however many there are."""
        from transformers.modeling_layers import GradientCheckpointingLayer

        return [part for part in self.network.get_decoder().modules() if isinstance(part, GradientCheckpointingLayer)]

    def _run_compiled(self, on: bool) -> None:
        """Only what trains runs compiled: while answers are generated, every token changes the shapes."""
        for layer, call in self._compiled:
            run_compiled(layer, call if on else None)

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

    def look(self, images: Mapping[str, Tensor]) -> Seen:
        """Images with what the frozen vision tower makes of them, computed once for policy and reference.

        LLaVA-1.5: features [B, P, D_vision] of the layer that is read, without the class token. Other models: all that
        the language model is given or, where the projector is trained or sequences cannot be packed, nothing.
        """
        if not images or not self.packable:
            return Seen(images)
        if self._reads_one_clip_layer:
            with torch.no_grad():
                return Seen(images, self._clip_features(images["pixel_values"]))
        if self._trains_projector:
            return Seen(images)
        with torch.no_grad():
            return Seen(images, self._visual(images))

    @property
    def _trains_projector(self) -> bool:
        return self.settings.train_projector and self.adapted

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

    def _visual(self, images: Mapping[str, Tensor]) -> Visual:
        def joined(features: Any) -> Tensor:  # a tensor, or one for each picture
            features = features if isinstance(features, Tensor) else torch.cat(list(features))
            return features.flatten(0, -2)

        found = self.network.get_image_features(**images)
        return Visual(joined(found.pooler_output), [*map(joined, getattr(found, "deepstack_features", None) or ())])

    def decoder_inputs(
        self, input_ids_BT: Tensor, position_ids_BT: Tensor, attended_BT: Tensor, seen: Seen
    ) -> dict[str, Any]:
        """What the language model takes for tokens and pictures, apart from a mask.

        Token embeddings [B, T, D], the pictures' in place of the image tokens, and position ids, [B, T] or [3, B, T].
        ``position_ids_BT`` count tokens, and ``attended_BT`` is false for padding.
        """
        embeds_BTD = self.network.get_input_embeddings()(input_ids_BT)
        if not seen.images:
            if self._trains_projector and torch.is_grad_enabled():
                # Devices add up their gradients: all must have the same ones, with pictures or without.
                embeds_BTD = embeds_BTD + sum(0 * weight.sum() for weight in self.trained_parameters()[1])
            return {"inputs_embeds": embeds_BTD, "position_ids": position_ids_BT}
        if isinstance(seen.computed, Tensor):
            visual = Visual(self.network.model.multi_modal_projector(seen.computed).flatten(0, -2))
        else:
            visual = seen.computed or self._visual(seen.images)
        # Not masked_scatter, in whose backward pass the host waits for the device to count the image tokens.
        place_BT = self._is_image(input_ids_BT)
        row_BT = (place_BT.flatten().cumsum(0) - 1).clamp(min=0).view_as(input_ids_BT)
        image_BTD = visual.embeds_ND.to(embeds_BTD.dtype)[row_BT]
        inputs: dict[str, Any] = {"inputs_embeds": torch.where(place_BT[..., None], image_BTD, embeds_BTD)}
        if visual.deep_ND:
            inputs |= {"visual_pos_masks": place_BT, "deepstack_visual_embeds": list(visual.deep_ND)}
        if self.architecture.grid_positions:
            position_ids_BT = self._on_grids(input_ids_BT, position_ids_BT, attended_BT, seen.images)
        return inputs | {"position_ids": position_ids_BT}

    def _on_grids(
        self, input_ids_BT: Tensor, position_ids_BT: Tensor, attended_BT: Tensor, images: Mapping[str, Tensor]
    ) -> Tensor:
        """Positions [3, B, T] by the model's own rule, which knows nothing of packing: it counts on from y_w to y_l.

        Text counts on by one on each axis, so what moves y_l back to where y_w began is the same on all of them.
        """
        counted_3BT, _ = self.network.model.get_rope_index(
            input_ids_BT,
            mm_token_type_ids=self._is_image(input_ids_BT).int(),
            image_grid_thw=images["image_grid_thw"],
            attention_mask=attended_BT.long(),
        )
        column_BT = attended_BT.long().cumsum(-1) - 1
        return counted_3BT + (position_ids_BT - column_BT) * attended_BT

    def masks(self, visible_BTT: Tensor, input_ids_BT: Tensor, position_ids_BT: Tensor, dtype: torch.dtype) -> Any:
        """The attention mask of every kind of layer, [B, 1, T, T] as a term of the scores: one, or a mapping by kind.

        ``visible_BTT``: what full causal attention sees. A window is measured in positions, not in columns.
        """
        if self.architecture.two_way_images:
            image_BT = self._is_image(input_ids_BT)
            starts_BT = image_BT & ~torch.nn.functional.pad(image_BT, (1, 0))[:, :-1]
            picture_BT = starts_BT.cumsum(-1)
            same_BTT = picture_BT[:, :, None] == picture_BT[:, None, :]
            visible_BTT = visible_BTT | (same_BTT & image_BT[:, :, None] & image_BT[:, None, :])
        config = self.network.config.get_text_config()
        kinds, found = set(layer_kinds(config)), {}
        if FULL in kinds:
            found[FULL] = additive(visible_BTT[:, None], dtype)
        if SLIDING in kinds:
            behind_BTT = position_ids_BT[:, :, None] - position_ids_BT[:, None, :]
            found[SLIDING] = additive((visible_BTT & (behind_BTT < sliding_window(config)))[:, None], dtype)
        mixed = SLIDING in kinds and getattr(config, "layer_types", None)
        return found if mixed else next(iter(found.values()))

    def predict(self, packed: Packed, seen: Seen) -> Tensor:
        """Logits [U, V] at the positions that predict response tokens, and nowhere else.

        ``seen`` is what ``look`` returned.
        """
        from povid.model.fused import predicting_rows  # imports transformers and peft, which takes seconds

        if not self.packable:
            return self._predict_unpacked(packed, seen.images)
        attended_BT = packed.segment_BT != PADDING
        inputs = self.decoder_inputs(packed.input_ids_BT, packed.position_ids_BT, attended_BT, seen)
        # Without a mask sdpa takes a faster kernel; other implementations may need the mask nevertheless.
        causal = packed.causal and not (self.architecture.two_way_images and seen.images)
        mask = None
        if not (causal and attention_name(self.network.config.get_text_config()) == "sdpa"):
            dtype = inputs["inputs_embeds"].dtype
            mask = self.masks(packed.attention()[:, 0], packed.input_ids_BT, packed.position_ids_BT, dtype)
        decoder = self.network.get_decoder()
        with predicting_rows(decoder, packed) as place_U, no_search_for_packing():
            hidden_BUD = decoder(**inputs, attention_mask=mask, use_cache=False).last_hidden_state
        return self.network.get_output_embeddings()(hidden_BUD[packed.example_U, place_U])

    def _predict_unpacked(self, packed: Packed, images: Mapping[str, Tensor]) -> Tensor:
        """``predict`` for models whose sequences cannot be packed: whole sequences through the whole model."""
        inputs = {"input_ids": packed.input_ids_BT, "attention_mask": (packed.segment_BT >= 0).long(), **images}
        inputs |= self.token_kinds(packed.input_ids_BT)
        hidden_BTD = self.network.model(**inputs, use_cache=False).last_hidden_state
        return self.network.get_output_embeddings()(hidden_BTD[packed.example_U, packed.column_U])

    def token_kinds(self, input_ids_BT: Tensor) -> dict[str, Tensor]:
        """Which tokens are an image's (1) and which are text (0), for models whose own forward pass asks for it."""
        asked = inspect.signature(self.network.forward).parameters
        named = ["mm_token_type_ids"] + ["token_type_ids"] * self.architecture.two_way_images
        return {name: self._is_image(input_ids_BT).int() for name in named if name in asked}

    def _is_image(self, input_ids_BT: Tensor) -> Tensor:
        return input_ids_BT == self.network.config.image_token_id


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
