"""The keys and values of the past, written in place: no step copies what earlier steps made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)


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

    def draft(self) -> None:
        """What comes now may be forgotten again by `keep`, which a buffer of rows always allows."""

    def keep(self, base: int, rows: Sequence[int]) -> None:
        """Keeps the first `base` rows and, moved up behind them, those at `rows` (ascending, counted from `base`)."""
        if not self.is_initialized or self.keys is None or self.values is None:
            return
        if rows and rows[-1] != len(rows) - 1:
            index = torch.tensor(rows, device=self.keys.device) + base
            for kept in (self.keys, self.values):
                kept[..., base : base + len(rows), :] = kept.index_select(-2, index)
        self.keys = self.keys[..., : base + len(rows), :]
        self.values = self.values[..., : base + len(rows), :]

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


class WindowLayer(DynamicSlidingWindowLayer):
    """A layer with a window that can take back what was appended to it.

    Between passes it holds the last `sliding_window` - 1 rows, as transformers' own does. From `draft` to `keep`
    it drops none, so that drafted rows may go and those before them are still there.
    """

    def __init__(self, sliding_window: int) -> None:
        super().__init__(sliding_window=sliding_window)
        self._drafting = False

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends [batch, heads, new tokens, width] and returns all that was held, with it."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        self.cumulative_length += key_states.shape[-2]
        keys = torch.cat([self.keys, key_states], dim=-2)
        values = torch.cat([self.values, value_states], dim=-2)
        self.keys, self.values = keys, values
        if not self._drafting:
            self._trim()
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys the next pass of `query_length` tokens sees, and the place of the first one."""
        held = self.keys.shape[-2] if self.is_initialized and self.keys is not None else 0
        return held + query_length, self.cumulative_length - held

    def draft(self) -> None:
        """What comes now may be forgotten again by `keep`."""
        self._drafting = True

    def keep(self, base: int, rows: Sequence[int]) -> None:
        """As `GrowingLayer.keep`, for what was appended since `draft`, when there were `base` tokens."""
        self._drafting = False
        if not self.is_initialized or self.keys is None or self.values is None:
            return
        held = self.keys.shape[-2] - (self.cumulative_length - base)
        places = [*range(held), *(held + row for row in rows)]
        index = torch.tensor(places, dtype=torch.long, device=self.keys.device)
        self.keys, self.values = self.keys.index_select(-2, index), self.values.index_select(-2, index)
        self.cumulative_length = base + len(rows)
        self._trim()

    def _trim(self) -> None:
        assert self.keys is not None
        assert self.values is not None
        self.keys = self.keys[:, :, -self.sliding_window + 1 :, :]
        self.values = self.values[:, :, -self.sliding_window + 1 :, :]


def new_cache(model: Any, room: int) -> Any:
    """An empty cache for one sequence of at most `room` tokens, or None where the model makes its own.

    Layers with a recurrent state keep transformers' own classes.
    """
    if not model._supports_default_dynamic_cache():
        return None
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    cache.layers = [_own_layer(layer, room) for layer in cache.layers]
    return cache


def _own_layer(layer: Any, room: int) -> Any:
    if type(layer) is DynamicLayer:
        return GrowingLayer(room)
    return WindowLayer(layer.sliding_window) if type(layer) is DynamicSlidingWindowLayer else layer


def has_recurrent_state(cache: Any) -> bool:
    """Whether some of the past is a state rather than rows, so that it cannot be cut and may not extend in chunks."""
    return cache is None or any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers)
