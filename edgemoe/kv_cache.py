"""The keys and values of the past, written in place: no step copies what earlier steps made."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, LinearAttentionCacheLayerMixin


class GrowingLayer(DynamicLayer):
    """A full-attention layer over one buffer with room to grow.

    transformers' own layer concatenates, which copies the whole past at every step. `keys` and `values`
    are views of the filled part, [batch, heads, tokens, width], valid until the buffer grows. `room` is how
    many tokens the next buffer is made for; a sequence that outgrows it gets half as much again.
    """

    def __init__(self, room: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.room = room
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends [batch, heads, new tokens, width] and returns views of all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past = self.get_seq_length()
        total = past + key_states.shape[-2]
        keys, values = self._reserve(key_states, value_states, past, total)
        keys[..., past:total, :] = key_states
        values[..., past:total, :] = value_states
        self.keys, self.values = keys[..., :total, :], values[..., :total, :]
        return self.keys, self.values

    def reset(self) -> None:
        """Forgets everything and gives the buffer back."""
        self._buffers = None
        super().reset()

    def fork(self, tokens: int, room: int) -> GrowingLayer:
        """A layer of its own that holds a copy of the first `tokens` rows, with `room`."""
        other = GrowingLayer(room)
        if self.is_initialized and self.keys is not None and self.values is not None:
            other.update(self.keys[..., :tokens, :], self.values[..., :tokens, :])
        return other

    def _reserve(
        self, key_states: torch.Tensor, value_states: torch.Tensor, past: int, total: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._buffers is not None and self._buffers[0].shape[-2] >= total:
            return self._buffers
        room = self.room if self.room >= total else max(total, past + past // 2)
        old, grown = (self.keys, self.values), []
        for kept, new in zip(old, (key_states, value_states), strict=True):
            buffer = new.new_empty(*new.shape[:-2], room, new.shape[-1])
            if past:
                assert kept is not None
                buffer[..., :past, :] = kept
            grown.append(buffer)
        self._buffers = (grown[0], grown[1])
        return self._buffers


def new_cache(model: Any, room: int) -> Any:
    """An empty cache for one sequence of at most `room` tokens, or None where the model makes its own.

    Layers with a window or a recurrent state keep transformers' own classes: they are bounded already.
    """
    if not model._supports_default_dynamic_cache():
        return None
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    cache.layers = [GrowingLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def has_recurrent_state(cache: Any) -> bool:
    """Whether some of the past is a state rather than rows, so that it cannot be cut and may not extend in chunks."""
    return cache is None or any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers)
