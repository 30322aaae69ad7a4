"""Liger's kernels in place of the element-by-element parts of :mod:`povid.model.fused`: ``model.fused=liger``.

Norm, rotary embedding and the MLP's product are one kernel each way. LoRA and the last layer's rows stay ours. The
kernels are written in Triton and need a GPU; they give the same numbers within rounding, not digit for digit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from liger_kernel.transformers.functional import liger_rms_norm, liger_rope, liger_swiglu
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2MLP, Qwen2RMSNorm

from povid.model.fused import FUSED, DecoderLayer, FusedLoraLinear, GatedMLP, RMSNorm


class LigerMLP(GatedMLP):
    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        product = liger_swiglu(gate, up)
        if torch.is_grad_enabled() and isinstance(self.down_proj, FusedLoraLinear):
            return self.down_proj(product, sources=(gate.detach(), up.detach()))
        return self.down_proj(product)


class LigerRMSNorm(RMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        # Not in place, since the gradient that it would overwrite may be read by others.
        return liger_rms_norm(hidden_states, self.weight, self.variance_epsilon, 0.0, "llama", False)


class LigerDecoderLayer(DecoderLayer):
    def turn(
        self, query: Tensor, key: Tensor, angles: tuple[Tensor, Tensor], pick: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        if query.shape[2] != key.shape[2]:  # the last layer, of which Liger's kernel knows nothing
            return super().turn(query, key, angles, pick)
        return liger_rope(query, key, *angles)


class LigerLlamaMLP(LigerMLP, LlamaMLP):
    pass


class LigerQwen2MLP(LigerMLP, Qwen2MLP):
    pass


class LigerLlamaRMSNorm(LigerRMSNorm, LlamaRMSNorm):
    pass


class LigerQwen2RMSNorm(LigerRMSNorm, Qwen2RMSNorm):
    pass


class LigerLlamaDecoderLayer(LigerDecoderLayer, LlamaDecoderLayer):
    pass


class LigerQwen2DecoderLayer(LigerDecoderLayer, Qwen2DecoderLayer):
    pass


LIGER: dict[type[nn.Module], Any] = FUSED | {
    LlamaMLP: LigerLlamaMLP,
    Qwen2MLP: LigerQwen2MLP,
    LlamaRMSNorm: LigerLlamaRMSNorm,
    Qwen2RMSNorm: LigerQwen2RMSNorm,
    LlamaDecoderLayer: LigerLlamaDecoderLayer,
    Qwen2DecoderLayer: LigerQwen2DecoderLayer,
}
