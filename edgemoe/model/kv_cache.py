"""The keys, values and states of one sequence: appended in place, cropped, forked and rolled back."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

from edgemoe.model.head_cache import HeadCache

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

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """As the base class, which copies an empty list to the device twice and waits for it."""
        _begin_empty(self, key_states, value_states)

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
        if self.is_initialized and self.keys is not None and self.values is not None:
            other.update(self.keys[..., :tokens, :], self.values[..., :tokens, :])
        return other

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
        _begin_empty(self, key_states, value_states)

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


def _begin_empty(layer: Any, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Makes `layer` hold no row of keys and values such as these."""
    layer.dtype, layer.device = keys.dtype, keys.device
    layer.keys, layer.values = keys[..., :0, :], values[..., :0, :]
    layer.is_initialized = True


def cache_argument(model: Any) -> str:
    """What the forward of `model` and its output call the KV cache, which transformers 5.24 has renamed."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def new_cache(model: Any, capacity: int) -> Any:
    """An empty cache for one sequence of at most `capacity` tokens, or None where the model makes its own.

    Layers with a recurrent state keep transformers' own classes.
    """
    if not model._supports_default_dynamic_cache():
        return None
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    cache.layers = [_own_layer(layer, capacity) for layer in cache.layers]
    return cache


def _own_layer(layer: Any, capacity: int) -> Any:
    if type(layer) is DynamicLayer:
        return GrowingLayer(capacity)
    return WindowLayer(layer.sliding_window) if type(layer) is DynamicSlidingWindowLayer else layer


def has_recurrent_state(cache: Any) -> bool:
    """Whether some layer keeps a state and no rows: such a cache cannot be cropped, and may not extend in chunks."""
    return cache is None or any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers)


CAPACITY_STEP = 64
"""Capacities are multiples of this number of tokens and grow by at least an eighth: growing then copies little."""


class SequenceCache:
    """The KV cache of one sequence of `tokens` tokens, on the model's device. It belongs to one owner at a time.

    The owner is a running request, the prefix cache, or a draft model; a runner appends to it for its owner. `kv` is
    transformers' cache, or None before the first pass of a model that makes its own. Buffers hold `capacity` tokens,
    which is what the sequence is charged for.
    """

    def __init__(self, kv: Any, capacity: int, tokens: int = 0) -> None:
        self.kv = kv
        self.capacity = capacity
        self.tokens = tokens
        self.buffer_table: torch.Tensor | None = None
        """Where the layers' buffers lie, as kernels of a device read it; kept by the runner that made it."""
        self.head: HeadCache | None = None
        """What the model's draft head keeps of the sequence, where it has one."""

    @classmethod
    def empty(cls, model: Any, capacity: int) -> SequenceCache:
        """The cache of a sequence without tokens."""
        return cls(new_cache(model, capacity), capacity)

    def appended(self, tokens: int) -> None:
        """Counts `tokens` tokens that a pass has appended to `kv`, which may have replaced buffers."""
        self.tokens += tokens
        self.buffer_table = None

    def reserve(self, capacity: int) -> None:
        """Raises the capacity to `capacity` tokens; a buffer is replaced when it is full, and not before."""
        self.capacity = max(self.capacity, capacity)
        for layer in getattr(self.kv, "layers", ()):
            if isinstance(layer, GrowingLayer):
                layer.capacity = self.capacity
        if self.head is not None:
            self.head.reserve(self.capacity)

    def can_crop(self) -> bool:
        """Whether any number of the last tokens can be dropped: all layers hold rows, and no window has dropped one."""
        own = [] if self.head is None else self.head.kv.layers
        return type(self.kv) is DynamicCache and all(map(_keeps_all_rows, [*self.kv.layers, *own]))

    def can_always_crop(self) -> bool:
        """Whether `can_crop` holds at any length: no layer has a window or a state."""
        return type(self.kv) is DynamicCache and all(type(layer) is GrowingLayer for layer in self.kv.layers)

    def crop(self, tokens: int) -> None:
        """Drops all but the first `tokens`; only where `can_crop`."""
        for layer in self.kv.layers:
            layer.crop(tokens - self.tokens)
        if self.head is not None and tokens < self.tokens:
            self.head.crop(tokens)
        self.tokens = tokens

    @property
    def can_roll_back(self) -> bool:
        """Whether `rollback` can drop appended tokens: all layers hold rows."""
        return type(self.kv) is DynamicCache and all(
            type(layer) in (GrowingLayer, WindowLayer) for layer in self.kv.layers
        )

    def mark(self) -> None:
        """Marks the end: `rollback` can drop what is appended from now on. Only where `can_roll_back`."""
        for layer in self.kv.layers:
            layer.mark()
        if self.head is not None:
            self.head.mark()

    def rollback(self, base: int, rows: Sequence[int] = ()) -> None:
        """Drops what was appended since `mark`, when there were `base` tokens, except for `rows`.

        `rows` are ascending and counted from `base`; afterwards they follow one another.
        """
        with torch.inference_mode():
            for layer in self.kv.layers:
                layer.rollback(base, rows)
            if self.head is not None:
                self.head.rollback(rows)
        self.tokens = base + len(rows)

    def fork(self, tokens: int, capacity: int) -> SequenceCache:
        """A copy of the first `tokens` tokens with its own buffers. ValueError for fewer than all unless `can_crop`."""
        if tokens < self.tokens and not self.can_crop():
            raise ValueError(f"a cache that cannot be cropped has {self.tokens} tokens, not {tokens}")
        self.trim()
        with torch.inference_mode():
            other = SequenceCache(_copied(self.kv, tokens, self.tokens, capacity), capacity, tokens)
            if self.head is not None:
                rows = self.head.rows
                other.head = self.head.fork(_copied(self.head.kv, rows, rows, capacity).layers)
                if tokens < self.tokens:
                    other.head.crop(tokens)
            return other

    def trim(self) -> None:
        """Frees rows that windows have dropped: the rows that are left are views of the last chunk's."""
        with torch.inference_mode():
            for layer in getattr(self.kv, "layers", ()):
                if not isinstance(layer, GrowingLayer):
                    _own(vars(layer))


def _copied(kv: Any, tokens: int, whole: int, capacity: int) -> Any:
    """A copy of the first `tokens` of `whole` tokens of a cache of transformers."""
    if type(kv) is not DynamicCache:
        return copy.deepcopy(kv)
    other: Any = copy.copy(kv)
    other.layers = []
    for layer in kv.layers:
        if isinstance(layer, GrowingLayer):
            # Copies no row that would be cropped at once.
            other.layers.append(layer.fork(tokens, capacity))
        else:
            other.layers.append(copy.deepcopy(layer))
            if tokens < whole:
                other.layers[-1].crop(tokens - whole)
    return other


def capacity_for(tokens: int, limit: int) -> int:
    """The capacity for a sequence of `tokens` tokens that will have at most `limit`."""
    wanted = max(tokens + tokens // 8, tokens + 1)
    return max(tokens, min(limit, -(-wanted // CAPACITY_STEP) * CAPACITY_STEP))


def _own(values: dict[Any, Any]) -> None:
    """Replaces every tensor that is part of a larger storage by a copy."""
    for name, value in values.items():
        if isinstance(value, torch.Tensor) and value.untyped_storage().nbytes() > value.nbytes:
            values[name] = value.clone()
        elif isinstance(value, dict):
            _own(value)


def _keeps_all_rows(layer: Any) -> bool:
    if type(layer) is WindowLayer:
        return bool(layer.get_seq_length() < layer.sliding_window)
    return type(layer) is GrowingLayer
