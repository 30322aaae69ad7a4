"""What differs between vision-language models, and where in them LoRA goes."""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel, ConfigDict
from torch import nn

FULL, SLIDING = "full_attention", "sliding_attention"


class Architecture(BaseModel):
    """What the project must know of a kind of model. The defaults are those of a kind that it does not know.

    Args:
        projector: end of the full name of the module between vision tower and language model; None where unknown, and
            then it cannot be trained.
        packable: whether the language model takes embeddings with positions and masks of our making, and so a packed
            sequence (see :meth:`packs`). Other models read every sequence by itself, which is slower.
        grid_positions: whether positions have three axes, so that image tokens lie on a grid (Qwen's M-RoPE); the
            model's own ``get_rope_index`` gives those of an unpacked sequence.
        two_way_images: whether all tokens of a picture see each other (Gemma 3); the others see what precedes them.
        clip_layer: whether the projector reads the output of a single layer of a CLIP tower. The layers above it are
            then skipped, and policy and reference share its features.
        question_in_image: whether the image's features depend on the question, so that questions share no prefix.
        needs_image: whether every question must come with an image.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    projector: str | None = None
    packable: bool = False
    grid_positions: bool = False
    two_way_images: bool = False
    clip_layer: bool = False
    question_in_image: bool = False
    needs_image: bool = False

    def packs(self, text_config: Any) -> bool:
        """Whether a model with this language model is scored packed: ``packable``, and nothing but a mask has to keep
        y_l from seeing y_w.

        Full and sliding-window attention need no more than a mask. Layers of other kinds (linear attention, attention
        in chunks) carry something from one column to the next.
        """
        return self.packable and set(layer_kinds(text_config)) <= {FULL, SLIDING}

    def unquantized(self) -> list[str]:
        """Patterns of the module names that keep all of their bits when the language model's layers get four."""
        names = ["lm_head", "vision_tower", "vision_model", "visual", "qformer"]
        if self.projector:
            names.append(self.projector)
        return [rf"(?:.*\.)?{re.escape(name)}" for name in names]  # transformers matches from a name's beginning


KNOWN = {  # by transformers' model_type
    "llava": Architecture(projector="multi_modal_projector", packable=True, clip_layer=True),
    "llava_next": Architecture(projector="multi_modal_projector", packable=True),
    "llava_onevision": Architecture(projector="multi_modal_projector", packable=True),
    "internvl": Architecture(projector="multi_modal_projector", packable=True),
    "idefics3": Architecture(projector="connector", packable=True),
    "smolvlm": Architecture(projector="connector", packable=True),
    "instructblip": Architecture(
        projector="language_projection", packable=True, question_in_image=True, needs_image=True
    ),
    "qwen2_5_vl": Architecture(projector="visual.merger", packable=True, grid_positions=True),
    "qwen3_vl": Architecture(projector="visual.merger", packable=True, grid_positions=True),
    "gemma3": Architecture(projector="multi_modal_projector", packable=True, two_way_images=True),
}


def layer_kinds(text_config: Any) -> list[str]:
    """The kind of attention of every layer of a language model, by transformers' names."""
    return getattr(text_config, "layer_types", None) or [SLIDING if sliding_window(text_config) else FULL]


def sliding_window(text_config: Any) -> int | None:
    """How many positions, its own included, a position sees in layers with a sliding window; None without any."""
    return getattr(text_config, "sliding_window", None)


def architecture_of(model_type: str) -> Architecture:
    """What is known of a model type; an unknown one is scored the slow way, with its projector frozen."""
    return KNOWN.get(model_type, Architecture())


def lora_targets(model: Any) -> str:
    """Pattern of the full names of all linear layers of the language model (Table 5: lora_target all).

    Its head, the projector and the vision tower are left out.
    """
    decoder = model.get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    leaves = {name.rpartition(".")[2] for name, module in decoder.named_modules() if isinstance(module, nn.Linear)}
    return rf"{re.escape(prefix)}\..*\.({'|'.join(sorted(leaves))})"
