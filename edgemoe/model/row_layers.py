"""Layers of a KV cache that hold rows: appended in place, cropped, and rolled back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicIndexedLayer, DynamicLayer, DynamicSlidingWindowLayer

SPARE_ROWS = 64
"""Rows behind those of a window that a buffer has room for."""


class GrowingLayer(DynamicLayer):
    """A full-attention layer that appends to one buffer.

    transformers' own layer concatenates, which copies all keys and values at every step. Here `keys` and `values`
    are views of the filled part, [batch, heads, tokens, width], valid until the buffer is replaced. The next buffer
    holds `capacity` tokens, or half as many again as are cached where that is less.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.capacity = capacity
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    @classmethod
    def of(cls, layer: DynamicLayer, capacity: int) -> GrowingLayer:
        """A layer with the rows of `layer`."""
        made = cls(capacity)
        if layer.is_initialized and layer.keys is not None and layer.values is not None and layer.keys.dim() > 1:
            made.update(layer.keys, layer.values)
        return made

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """As the base class, which copies an empty list to the device twice and waits for it."""
        begin_empty(self, key_states, value_states)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends [batch, heads, new tokens, width] and returns views of all keys and values."""
        past = self.get_seq_length()
        keys, values = self.extend(key_states, value_states)
        keys[..., past:, :] = key_states
        values[..., past:, :] = value_states
        return keys, values

    def extend(self, like_keys: torch.Tensor, like_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `update` with what is in the new rows left to the caller; the arguments give shapes and dtypes alone."""
        if not self.is_initialized:
            self.lazy_initialization(like_keys, like_values)
        past = self.get_seq_length()
        total = past + like_keys.shape[-2]
        keys, values = self._reserve(like_keys, like_values, past, total)
        self.keys, self.values = keys[..., :total, :], values[..., :total, :]
        return self.keys, self.values

    def make_room(self, tokens: int) -> bool:
        """Makes the buffers hold `tokens` more rows. Returns whether they were replaced. Only where there are rows."""
        assert self.keys is not None
        assert self.values is not None
        before, past = self._buffers, self.get_seq_length()
        return self._reserve(self.keys, self.values, past, past + tokens) is not before

    @property
    def buffers(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Those of keys and values, [batch, heads, capacity, width] each, filled or not; None before the first row."""
        return self._buffers

    def advance(self, tokens: int) -> None:
        """Counts `tokens` rows that were written behind the others, in the buffers."""
        assert self._buffers is not None
        total = self.get_seq_length() + tokens
        keys, values = self._buffers
        self.keys, self.values = keys[..., :total, :], values[..., :total, :]

    def reset(self) -> None:
        """Drops everything and frees the buffer."""
        self._buffers = None
        super().reset()

    def mark(self) -> None:
        """Does nothing: a buffer of rows can always be rolled back."""

    def rollback(self, base: int, rows: Sequence[int]) -> None:
        """Keeps the first `base` rows and, moved up behind them, those at `rows` (ascending, counted from `base`)."""
        if not self.is_initialized or self.keys is None or self.values is None:
            return
        if rows and rows[-1] != len(rows) - 1:
            index = torch.tensor([base + row for row in rows]).to(self.keys.device, non_blocking=True)
            for kept in (self.keys, self.values):
                kept[..., base : base + len(rows), :] = kept.index_select(-2, index)
        self.keys = self.keys[..., : base + len(rows), :]
        self.values = self.values[..., : base + len(rows), :]

    def fork(self, tokens: int, capacity: int) -> GrowingLayer:
        """A layer of its own that holds a copy of the first `tokens` rows, with `capacity`."""
        other = GrowingLayer(capacity)
        self.fill(other, tokens)
        return other

    def fill(self, other: GrowingLayer, tokens: int) -> None:
        """Appends the first `tokens` rows to `other`."""
        if self.is_initialized and self.keys is not None and self.values is not None:
            other.update(self.keys[..., :tokens, :], self.values[..., :tokens, :])

    def _reserve(
        self, key_states: torch.Tensor, value_states: torch.Tensor, past: int, total: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._buffers is not None and self._buffers[0].shape[-2] >= total:
            return self._buffers
        capacity = self.capacity if self.capacity >= total else max(total, past + past // 2)
        old, grown = (self.keys, self.values), []
        for kept, new in zip(old, (key_states, value_states), strict=True):
            buffer = new.new_empty(*new.shape[:-2], capacity, new.shape[-1])
            if past:
                assert kept is not None
                buffer[..., :past, :] = kept
            grown.append(buffer)
        self._buffers = (grown[0], grown[1])
        return self._buffers


class WindowLayer(DynamicSlidingWindowLayer):
    """A sliding-window layer that can be rolled back.

    Between passes it holds the last `sliding_window` - 1 rows, as transformers' own layer does. From `mark` to
    `rollback` it drops no row: a rollback needs the rows before the drafted ones. `make_room` puts the rows into a
    buffer with spare room, where a device appends; `update` takes them out of it again.
    """

    def __init__(self, sliding_window: int) -> None:
        super().__init__(sliding_window=sliding_window)
        self._drafting = False
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None
        self._first = 0
        """The row of the buffers that is the first one held."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """See `GrowingLayer`."""
        begin_empty(self, key_states, value_states)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends [batch, heads, new tokens, width] and returns the held rows and the new ones."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        self.cumulative_length += key_states.shape[-2]
        keys = torch.cat([self.keys, key_states], dim=-2)
        values = torch.cat([self.values, value_states], dim=-2)
        self.keys, self.values = keys, values
        self._buffers = None
        if not self._drafting:
            self._trim()
        return keys, values

    def make_room(self, tokens: int) -> bool:
        """As `GrowingLayer.make_room`."""
        assert self.keys is not None
        assert self.values is not None
        held = self.keys.shape[-2]
        if self._buffers is not None and self._first + held + tokens <= self._buffers[0].shape[-2]:
            return False
        grown = []
        for kept in (self.keys, self.values):
            buffer = kept.new_empty(*kept.shape[:-2], held + max(tokens, SPARE_ROWS), kept.shape[-1])
            buffer[..., :held, :] = kept
            grown.append(buffer)
        self._buffers, self._first = (grown[0], grown[1]), 0
        self._hold(held)
        return True

    @property
    def buffers(self) -> tuple[torch.Tensor, torch.Tensor, int] | None:
        """As those of `GrowingLayer`, and the number of the sequence's tokens before their first row."""
        if self._buffers is None or self.keys is None:
            return None
        return *self._buffers, self.cumulative_length - self.keys.shape[-2] - self._first

    def advance(self, tokens: int) -> None:
        """As `GrowingLayer.advance`."""
        assert self.keys is not None
        self.cumulative_length += tokens
        self._hold(self.keys.shape[-2] + tokens)
        if not self._drafting:
            self._trim()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys the next pass of `query_length` tokens attends to, and the position of the first one."""
        held = self.keys.shape[-2] if self.is_initialized and self.keys is not None else 0
        return held + query_length, self.cumulative_length - held

    def mark(self) -> None:
        """Keeps all rows until `rollback`."""
        self._drafting = True

    def rollback(self, base: int, rows: Sequence[int]) -> None:
        """As `GrowingLayer.rollback`, for what was appended since `mark`, when there were `base` tokens."""
        self._drafting = False
        if not self.is_initialized or self.keys is None or self.values is None:
            return
        held = self.keys.shape[-2] - (self.cumulative_length - base)
        if list(rows) != list(range(len(rows))):
            index = torch.tensor([held + row for row in rows]).to(self.keys.device, non_blocking=True)
            for kept in (self.keys, self.values):
                kept[..., held : held + len(rows), :] = kept.index_select(-2, index)
        self.keys = self.keys[..., : held + len(rows), :]
        self.values = self.values[..., : held + len(rows), :]
        self.cumulative_length = base + len(rows)
        self._trim()

    def _hold(self, rows: int) -> None:
        """Holds so many rows of the buffers."""
        assert self._buffers is not None
        keys, values = self._buffers
        self.keys, self.values = (each[..., self._first : self._first + rows, :] for each in (keys, values))

    def _trim(self) -> None:
        assert self.keys is not None
        assert self.values is not None
        before = self.keys.shape[-2]
        self.keys = self.keys[:, :, -self.sliding_window + 1 :, :]
        self.values = self.values[:, :, -self.sliding_window + 1 :, :]
        self._first += before - self.keys.shape[-2]


class IndexedLayer(DynamicIndexedLayer, GrowingLayer):
    """A full-attention layer with an indexer, whose keys, [1, tokens, width], are rows as the others are."""

    def __init__(self, capacity: int) -> None:
        GrowingLayer.__init__(self, capacity)
        self.indexer_keys: torch.Tensor | None = None
        self.indexer_position_ids: torch.Tensor | None = None
        self.is_indexer_initialized = False

    def rollback(self, base: int, rows: Sequence[int]) -> None:
        """As `GrowingLayer.rollback`."""
        super().rollback(base, rows)
        index = [*range(base), *(base + row for row in rows)]
        if self.indexer_keys is not None:
            self.indexer_keys = _picked(self.indexer_keys, index, 1)
        if self.indexer_position_ids is not None:
            self.indexer_position_ids = _picked(self.indexer_position_ids, index, -1)

    def fork(self, tokens: int, capacity: int) -> IndexedLayer:
        """As `GrowingLayer.fork`."""
        other = IndexedLayer(capacity)
        self.fill(other, tokens)
        if self.indexer_keys is not None:
            other.update_indexer(self.indexer_keys[:, :tokens])
        if self.indexer_position_ids is not None:
            other.indexer_position_ids = self.indexer_position_ids[..., :tokens].clone()
        return other


def _picked(values: torch.Tensor, index: Sequence[int], dim: int) -> torch.Tensor:
    """The rows `index` of `values` along `dim`: a view where they are the first ones."""
    if not index or index[-1] == len(index) - 1:
        return values.narrow(dim, 0, len(index))
    return values.index_select(dim, torch.tensor(index).to(values.device, non_blocking=True))


def begin_empty(layer: Any, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Makes `layer` hold no row of keys and values such as these."""
    layer.dtype, layer.device = keys.dtype, keys.device
    layer.keys, layer.values = keys[..., :0, :], values[..., :0, :]
    layer.is_initialized = True


def reserve_rows(kv: Any, capacity: int) -> None:
    """Lets the next buffers of the growing layers of a cache hold `capacity` rows at least."""
    for layer in getattr(kv, "layers", ()):
        if isinstance(layer, GrowingLayer):
            layer.capacity = max(layer.capacity, capacity)
