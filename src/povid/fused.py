"""The same numbers for less: what a language model with LoRA computes or keeps although nothing reads it.

``lighten`` changes three things in a network's modules, where they are of the kinds known here:
1. A LoRA layer adds its product to the frozen layer's result inside one matrix product, and scales the r-wide factor.
2. A gated MLP keeps gate and up for the backward pass and computes their product anew (element by element) when it is
   needed, instead of keeping four tensors of the inner width.
3. The last layer computes queries, output and MLP only where a response token is predicted (``predicting_rows``).

Shape suffixes: B = examples, T = positions, U = predicting positions, D = width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from povid.packing import Packed


def lighten(network: nn.Module) -> None:
    """Change the modules of a network, adapter layers inside it, in place. Weights and their names stay."""
    from peft.tuners.lora.layer import Linear as LoraLinear
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP
    from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2MLP

    decoder = network.get_decoder()
    for module in decoder.modules():
        if type(module) is LoraLinear and type(module.get_base_layer()) is nn.Linear and not module.lora_variant:
            module.forward = MethodType(_lora_linear, module)
        elif type(module) in (LlamaDecoderLayer, Qwen2DecoderLayer):
            if type(module.mlp) in (LlamaMLP, Qwen2MLP) and module.mlp.config.hidden_act == "silu":
                module.mlp.forward = partial(_gated_mlp, module.mlp, module)
            if module is decoder.layers[-1]:
                module.rows = None
                module.forward = MethodType(_last_layer, module)


def _lora_linear(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """peft's LoRA layer: x W' + s (x A') B'."""
    plain = args or kwargs or self.merged or len(self.active_adapters) != 1
    name = self.active_adapters[0] if self.active_adapters else None
    if self.disable_adapters:
        return self.base_layer(x) if not self.merged else type(self).forward(self, x, *args, **kwargs)
    if plain or (self.lora_A[name].weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type)):
        return type(self).forward(self, x, *args, **kwargs)
    flat = x.reshape(-1, x.shape[-1])
    narrow = linear(self.lora_dropout[name](flat), self.lora_A[name].weight) * self.scaling[name]
    wide = torch.addmm(self.base_layer(flat), narrow, self.lora_B[name].weight.T)
    return wide.view(*x.shape[:-1], wide.shape[-1])


class _Gated(torch.autograd.Function):
    """silu(gate) * up, keeping the two and nothing else."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return silu(gate) * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), grad * silu(gate)


def _gated_mlp(self: Any, layer: Any, x: Tensor) -> Tensor:
    gate, up = self.gate_proj(x), self.up_proj(x)
    if not torch.is_grad_enabled():
        return self.down_proj(silu(gate, inplace=True).mul_(up))
    product = _Gated.apply(gate, up)
    if layer.gradient_checkpointing:  # nothing is kept anyway
        return self.down_proj(product)
    place, size, sources = product.data_ptr(), product.numel(), (gate.detach(), up.detach())

    # LoRA's gradient needs the product, which costs nothing to make again and a third of the MLP's memory to keep.
    def keep(tensor: Tensor) -> Any:
        return (tensor.shape, sources) if tensor.data_ptr() == place and tensor.numel() == size else tensor

    def restore(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        shape, (gate, up) = kept
        return (silu(gate) * up).view(shape)

    with torch.autograd.graph.saved_tensors_hooks(keep, restore):
        return self.down_proj(product)


@contextmanager
def predicting_rows(decoder: nn.Module, packed: Packed) -> Iterator[Tensor]:
    """Inside, the decoder's last hidden states are those of the predicting positions alone, where that is possible.

    Yields the index [U] at which each predicting position then stands in its example. Under gradient checkpointing a
    layer is computed again later, when these rows are no longer known, so nothing is left out.
    """
    last = decoder.layers[-1] if hasattr(decoder, "layers") else None
    if not hasattr(last, "rows") or (last.gradient_checkpointing and torch.is_grad_enabled()):
        yield packed.column_U
        return
    last.rows = packed.columns_BU
    try:
        yield packed.slot_U
    finally:
        last.rows = None


def _last_layer(self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None,
                position_embeddings: tuple[Tensor, Tensor] | None = None, **kwargs: Any) -> Tensor:
    if self.rows is None:
        return type(self).forward(self, hidden_states, attention_mask=attention_mask,
                                  position_embeddings=position_embeddings, **kwargs)
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.llama.modeling_llama import eager_attention_forward, rotate_half

    attention, rows_BU = self.self_attn, self.rows
    rows_BU1 = rows_BU[..., None]

    def pick(values_BTX: Tensor) -> Tensor:
        values_BTX = values_BTX.expand(rows_BU.shape[0], -1, -1)
        return values_BTX.gather(1, rows_BU1.expand(-1, -1, values_BTX.shape[-1]))

    def heads(projected: Tensor) -> Tensor:
        return projected.view(*projected.shape[:-1], -1, attention.head_dim).transpose(1, 2)

    def turn(values: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return values * cos[:, None] + rotate_half(values) * sin[:, None]

    normed_BTD = self.input_layernorm(hidden_states)
    cos, sin = position_embeddings
    query = turn(heads(attention.q_proj(pick(normed_BTD))), pick(cos), pick(sin))
    key = turn(heads(attention.k_proj(normed_BTD)), cos, sin)
    value = heads(attention.v_proj(normed_BTD))
    if attention_mask is None:  # causal
        places = torch.arange(normed_BTD.shape[1], device=rows_BU.device)
        mask = torch.zeros((), dtype=query.dtype, device=rows_BU.device).masked_fill(
            places > rows_BU1, torch.finfo(query.dtype).min)[:, None]
    else:
        mask = attention_mask[:, 0].gather(1, rows_BU1.expand(-1, -1, attention_mask.shape[-1]))[:, None]
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager_attention_forward)
    attended, _ = attend(attention, query, key, value, mask, dropout=0.0, scaling=attention.scaling)
    residual = pick(hidden_states) + attention.o_proj(attended.reshape(*rows_BU.shape, -1))
    return residual + self.mlp(self.post_attention_layernorm(residual))
