"""A key-value cache with room for the tokens to come."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

ROOM = 64  # tokens; transformers' own layer has no room and copies everything for every token


class RoomyLayer(DynamicLayer):
    """One layer's keys and values [B, heads, T, width], which are copied once in ``ROOM`` tokens."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **unused: Any) -> tuple[Tensor, Tensor]:
        """Append along T. Returns all keys and all values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.space: tuple[Tensor, Tensor] | None = None
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if self.space is None or self.space[0].shape[-2] < end:
            self.space = self._larger(self.keys, key_states, end), self._larger(self.values, value_states, end)
        for space, new in zip(self.space, (key_states, value_states)):
            space[:, :, start:end] = new
        self.keys, self.values = (space[:, :, :end] for space in self.space)
        return self.keys, self.values

    @staticmethod
    def _larger(old: Tensor, new: Tensor, length: int) -> Tensor:
        space = new.new_empty(*new.shape[:2], length + ROOM, new.shape[-1])
        if old.numel():
            space[:, :, : old.shape[-2]] = old
        return space

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order."""
        super().batch_select_indices(indices)
        self.space = None


def key_values(config: Any) -> Cache:
    """An empty cache for a language model; with sliding-window attention it is transformers' own."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or getattr(config, "sliding_window", None):
        return DynamicCache(config=config)
    return Cache(layer_class_to_replicate=RoomyLayer)


def bytes_per_token(network: Any) -> int:
    """Bytes that one token's keys and values take over all layers."""
    config = network.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = next(p for p in network.parameters() if p.is_floating_point()).element_size()
    return 2 * config.num_hidden_layers * heads * width * size
