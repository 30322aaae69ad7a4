"""The same numbers for less: a language model with LoRA that computes and keeps only what is read.

:func:`fuse` turns modules that transformers and peft made into subclasses of their own classes, in place; weights and
their names stay. ``model.fused=false`` leaves the modules alone. What changes:

1. A LoRA layer adds its low-rank product to the frozen layer's output within one matrix product, and in its backward
   pass the rank is never the inner loop of a product.
2. A gated MLP keeps gate and up for the backward pass and computes their product again when it is needed, instead of
   keeping four tensors of the inner width.
3. RMSNorm and the rotary embedding have backward passes of their own. Their forward passes are transformers', digit
   for digit.
4. The last layer computes queries, output and MLP only where a response token is predicted (:func:`predicting_rows`).

Shape suffixes: B = examples, T = positions, U = predicting positions, H = heads, D = width, N = rows of a product,
R = LoRA's rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2MLP, Qwen2RMSNorm

from povid.internals import attention_function, is_watched
from povid.model.packing import Packed


def fuse(network: Any, table: Mapping[type[nn.Module], Any]) -> None:
    """Turn the modules of a network's language model, adapter layers included, into their subclasses in a table.

    ``table``: ``FUSED``, or another one with such classes. Modules of a kind that has none, such as LoRA on a four-bit
    layer, stay what they are.
    """
    for module in network.get_decoder().modules():
        fused = table.get(type(module))
        if fused is not None and fused.fits(module):
            vars(module).pop("forward", None)  # accelerate wraps it for four-bit models, to move inputs between devices
            module.__class__ = fused


# --- LoRA ------------------------------------------------------------------------------------------------------------


class _LowRank(torch.autograd.Function):
    """wide + s x A' B', added to ``wide`` in place.

    ``sources``: gate and up where x is silu(gate) * up; they are kept instead of x, which is computed again.
    """

    @staticmethod
    def forward(
        ctx: Any, wide_ND: Tensor, x_ND: Tensor, a_RD: Tensor, b_DR: Tensor, scaling: float, *sources: Tensor
    ) -> Tensor:
        narrow_RN = a_RD @ x_ND.T
        ctx.scaling, ctx.recomputed = scaling, bool(sources)
        ctx.save_for_backward(narrow_RN, a_RD, b_DR, *(sources or (x_ND,)))
        ctx.mark_dirty(wide_ND)
        return wide_ND.addmm_(narrow_RN.T, b_DR.T, alpha=scaling)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        narrow_RN, a_RD, b_DR, *sources = ctx.saved_tensors
        x_ND = silu(sources[0]).mul_(sources[1]) if ctx.recomputed else sources[0]
        narrow_grad_RN = (b_DR.T @ grad_ND.T).mul_(ctx.scaling)
        grad_x = narrow_grad_RN.T @ a_RD if ctx.needs_input_grad[1] else None
        grad_b = (narrow_RN @ grad_ND).T.mul(ctx.scaling)
        return grad_ND, grad_x, narrow_grad_RN @ x_ND, grad_b, None, *(None for _ in ctx.needs_input_grad[5:])


def low_rank(wide_ND: Tensor, x_ND: Tensor, a_RD: Any, b_DR: Any, scaling: float, *sources: Tensor) -> Tensor:
    """wide + s x A' B'; the compiler, if one is reading this, decides for itself what is kept and in which order."""
    if torch.compiler.is_compiling():
        return torch.addmm(wide_ND, x_ND @ a_RD.T, b_DR.T, alpha=scaling)
    return _LowRank.apply(wide_ND, x_ND, a_RD, b_DR, scaling, *sources)


class FusedLoraLinear(LoraLinear):
    """peft's LoRA layer on a linear layer: x W' + s (x A') B'.

    Merged or several adapters, and adapters in another dtype than x outside of autocast, are left to peft.
    """

    @staticmethod
    def fits(module: LoraLinear) -> bool:
        return type(module.get_base_layer()) is nn.Linear and not module.lora_variant

    def forward(self, x: Tensor, *args: Any, sources: tuple[Tensor, ...] = (), **kwargs: Any) -> Tensor:
        """[..., in] to [..., out]. ``sources``: see ``_LowRank``."""
        if self.disable_adapters and not self.merged:
            return self.base_layer(x)
        name = self.active_adapters[0] if len(self.active_adapters) == 1 else None
        mixed = torch.is_autocast_enabled(x.device.type)
        if args or kwargs or self.merged or name is None or (self.lora_A[name].weight.dtype != x.dtype and not mixed):
            return super().forward(x, *args, **kwargs)
        flat_ND = x.reshape(-1, x.shape[-1])
        wide_ND, dropped_ND = self.base_layer(flat_ND), self.lora_dropout[name](flat_ND)
        if dropped_ND is not flat_ND:
            sources = ()
        dtype = wide_ND.dtype
        wide_ND = low_rank(
            wide_ND,
            dropped_ND.to(dtype),
            self.lora_A[name].weight.to(dtype),
            self.lora_B[name].weight.to(dtype),
            self.scaling[name],
            *(source.reshape(flat_ND.shape) for source in sources),
        )
        return wide_ND.view(*x.shape[:-1], wide_ND.shape[-1])


# --- element by element ----------------------------------------------------------------------------------------------


class _Gated(torch.autograd.Function):
    """silu(gate) * up, for which only gate and up are kept."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), silu(gate).mul_(grad)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)): what is fused of LlamaMLP and Qwen2MLP."""

    gate_proj: Any
    up_proj: Any
    down_proj: Any

    @staticmethod
    def fits(module: nn.Module) -> bool:
        return module.config.hidden_act == "silu"

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if not torch.is_grad_enabled():
            return self.down_proj(silu(gate, inplace=True).mul_(up))
        if torch.compiler.is_compiling():
            return self.down_proj(silu(gate) * up)
        product = _Gated.apply(gate, up)
        # LoRA's gradient needs the product, which costs little to compute again and a third of the memory to keep.
        if isinstance(self.down_proj, FusedLoraLinear):
            return self.down_proj(product, sources=(gate.detach(), up.detach()))
        return self.down_proj(product)


class FusedLlamaMLP(GatedMLP, LlamaMLP):
    pass


class FusedQwen2MLP(GatedMLP, Qwen2MLP):
    pass


class _Normed(torch.autograd.Function):
    """weight * x / sqrt(mean(x^2) + eps) as transformers computes it; x and one number per row are kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, inverse)
        return weight * (wide * inverse).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, weight, inverse = ctx.saved_tensors
        grad, normed = (grad * weight).float(), x.float() * inverse
        along = (grad * normed).mean(-1, keepdim=True)
        return (grad - normed.mul_(along)).mul_(inverse).to(x.dtype), None, None


class RMSNorm(nn.Module):
    """What is fused of LlamaRMSNorm and Qwen2RMSNorm; a weight that is trained is left to transformers."""

    weight: Any
    variance_epsilon: Any

    @staticmethod
    def fits(module: nn.Module) -> bool:
        return True

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.weight.requires_grad or torch.compiler.is_compiling():
            return super().forward(hidden_states)
        return _Normed.apply(hidden_states, self.weight, self.variance_epsilon)


class FusedLlamaRMSNorm(RMSNorm, LlamaRMSNorm):
    pass


class FusedQwen2RMSNorm(RMSNorm, Qwen2RMSNorm):
    pass


class _Turned(torch.autograd.Function):
    """Rotary embedding of x [B, H, T, D]: x cos + (x with its halves swapped) sin, sin negated in the first half."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, signed_sin)
        return (x * cos).add_(x.roll(x.shape[-1] // 2, -1).mul_(signed_sin))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, signed_sin = ctx.saved_tensors
        return (grad * cos).add_((grad * signed_sin).roll(grad.shape[-1] // 2, -1)), None, None


def turned(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """The rotary embedding: see ``_Turned``."""
    if torch.compiler.is_compiling():
        return x * cos + x.roll(x.shape[-1] // 2, -1) * signed_sin
    return _Turned.apply(x, cos, signed_sin)


# --- layers ----------------------------------------------------------------------------------------------------------


class DecoderLayer(nn.Module):
    """What is fused of LlamaDecoderLayer and Qwen2DecoderLayer.

    ``rows_BU``: the only columns of its output that are wanted, set by :func:`predicting_rows`; None for all. A layer
    with a key-value cache, or whose attention weights somebody records, is left to transformers.
    """

    rows_BU: Tensor | None = None
    self_attn: Any
    mlp: Any
    input_layernorm: Any
    post_attention_layernorm: Any

    @staticmethod
    def fits(module: nn.Module) -> bool:
        return True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # An argument, since under gradient checkpointing the backward pass calls forward again with the same ones.
        return super().__call__(*args, **kwargs, **({} if self.rows_BU is None else {"rows_BU": self.rows_BU}))

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        rows_BU: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """[B, T, D] to [B, T, D], or to [B, U, D] with ``rows_BU``."""
        attention = self.self_attn
        cached = any(kwargs.get(name) is not None for name in ("cache", "past_key_values"))  # its name changed in 5.24
        if rows_BU is None and (cached or is_watched(attention)):
            return super().forward(
                hidden_states, attention_mask=attention_mask, position_embeddings=position_embeddings, **kwargs
            )

        def pick(values_BTX: Tensor) -> Tensor:
            if rows_BU is None:
                return values_BTX
            values_BTX = values_BTX.expand(rows_BU.shape[0], -1, -1)
            return values_BTX.gather(1, rows_BU[..., None].expand(-1, -1, values_BTX.shape[-1]))

        def heads(projected: Tensor) -> Tensor:
            return projected.view(*projected.shape[:-1], -1, attention.head_dim).transpose(1, 2)

        normed_BTD = self.input_layernorm(hidden_states)
        query, key = heads(attention.q_proj(pick(normed_BTD))), heads(attention.k_proj(normed_BTD))
        query, key = self.turn(query, key, position_embeddings, pick)
        value = heads(attention.v_proj(normed_BTD))
        mask = attention_mask
        if rows_BU is not None and mask is None:  # causal
            places = torch.arange(normed_BTD.shape[1], device=rows_BU.device)
            mask = torch.zeros((), dtype=query.dtype, device=rows_BU.device).masked_fill(
                places > rows_BU[..., None], torch.finfo(query.dtype).min
            )[:, None]
        elif rows_BU is not None:
            mask = mask[:, 0].gather(1, rows_BU[..., None].expand(-1, -1, mask.shape[-1]))[:, None]
        attend = attention_function(attention.config)
        attended, _ = attend(attention, query, key, value, mask, dropout=0.0, scaling=attention.scaling)
        residual = pick(hidden_states)
        residual = residual + attention.o_proj(attended.reshape(*residual.shape[:-1], -1))
        return residual + self.mlp(self.post_attention_layernorm(residual))

    def turn(
        self, query: Tensor, key: Tensor, angles: tuple[Tensor, Tensor], pick: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Query and key with their rotary embedding.

        ``angles``: cosines and sines [B, T, D]; ``pick`` gives what belongs to the query's columns.
        """
        cos, sin = angles
        half = sin.shape[-1] // 2
        signed_sin = torch.cat((-sin[..., :half], sin[..., half:]), -1)
        query = turned(query, pick(cos)[:, None], pick(signed_sin)[:, None])
        return query, turned(key, cos[:, None], signed_sin[:, None])


class FusedLlamaDecoderLayer(DecoderLayer, LlamaDecoderLayer):
    pass


class FusedQwen2DecoderLayer(DecoderLayer, Qwen2DecoderLayer):
    pass


FUSED: dict[type[nn.Module], Any] = {
    LoraLinear: FusedLoraLinear,
    LlamaMLP: FusedLlamaMLP,
    Qwen2MLP: FusedQwen2MLP,
    LlamaRMSNorm: FusedLlamaRMSNorm,
    Qwen2RMSNorm: FusedQwen2RMSNorm,
    LlamaDecoderLayer: FusedLlamaDecoderLayer,
    Qwen2DecoderLayer: FusedQwen2DecoderLayer,
}


@contextmanager
def predicting_rows(decoder: Any, packed: Packed) -> Iterator[Tensor]:
    """Inside, the decoder's last layer computes the predicting positions alone, where that is possible.

    Yields the index [U] at which each predicting position then stands in its example.
    """
    last = decoder.layers[-1] if hasattr(decoder, "layers") else None
    if not isinstance(last, DecoderLayer):
        yield packed.column_U
        return
    last.rows_BU = packed.columns_BU
    try:
        yield packed.slot_U
    finally:
        last.rows_BU = None
