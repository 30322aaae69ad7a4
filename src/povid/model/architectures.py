"""What differs between vision-language models, and where in them LoRA goes."""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel, ConfigDict
from torch import nn


class Architecture(BaseModel):
    """What the project must know of a kind of model. The defaults are those of a kind that it does not know.

    Args:
        projector: end of the full name of the module between vision tower and language model; None where unknown, and
            then it cannot be trained.
        packable: whether the language model accepts a packed sequence, that is, one-dimensional positions and any 4-D
            mask. Other models read every sequence by itself, which is slower.
        clip_layer: whether the projector reads the output of a single layer of a CLIP tower. The layers above it are
            then skipped, and policy and reference share its features.
        question_in_image: whether the image's features depend on the question, so that questions share no prefix.
        needs_image: whether every question must come with an image.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    projector: str | None = None
    packable: bool = False
    clip_layer: bool = False
    question_in_image: bool = False
    needs_image: bool = False

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
    "qwen2_5_vl": Architecture(projector="visual.merger"),  # its positions have three axes
}


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
