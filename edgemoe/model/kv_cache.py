"""The keys, values and states of one sequence: appended in place, cropped, forked and rolled back."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, LinearAttentionCacheLayerMixin

from edgemoe.model.head_cache import HeadCache
from edgemoe.model.rewind.kept_states import StatePool
from edgemoe.model.rewind.state_layers import StatesBeside, own_layer
from edgemoe.model.row_layers import GrowingLayer, WindowLayer, reserve_rows

_POOL = "edgemoe_state_pool"
"""The attribute of a model that holds the memory for kept states of its sequences."""
_BESIDE = "edgemoe_states"
"""The attribute of a model's own cache that holds its `StatesBeside`."""


def cache_argument(model: Any) -> str:
    """What the forward of `model` and its output call the KV cache, which transformers 5.24 has renamed."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def new_cache(model: Any, capacity: int) -> Any:
    """An empty cache for one sequence of at most `capacity` tokens, or None where the model makes its own.

    Its layers can be rolled back, except for kinds that `own_layer` does not know.
    """
    if not model._supports_default_dynamic_cache():
        return None
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    pool = vars(model).setdefault(_POOL, StatePool())
    cache.layers = [own_layer(layer, capacity, pool) for layer in cache.layers]
    return cache


def has_recurrent_state(cache: Any) -> bool:
    """Whether some layer keeps a state and no rows: such a cache cannot be cropped, and may not extend in chunks."""
    return cache is None or any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers)


STATES_BESIDE_NODES = 2
"""States that a marked cache keeps beside those of a draft's nodes: that of the mark, and of the draft's root."""
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
        self.marked: int | None = None
        """Number of tokens at the last `mark`; None without one that can be rolled back to."""

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
        reserve_rows(self.kv, self.capacity)
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
    def holds_rows_alone(self) -> bool:
        """Whether all layers hold rows of keys and values, of all tokens or of a window, and nothing else."""
        return type(self.kv) is DynamicCache and all(
            type(layer) in (GrowingLayer, WindowLayer) for layer in self.kv.layers
        )

    @property
    def can_roll_back(self) -> bool:
        """Whether `rollback` can drop appended tokens; a model that makes its own cache must have run a pass."""
        return self.kv is not None and all(hasattr(part, "rollback") for part in self.parts())

    def parts(self) -> list[Any]:
        """What is rolled back: the layers, and the states that a model's own kind of cache keeps beside them."""
        if self.kv is None:
            return []
        layers = self.kv.layers
        if type(self.kv) is DynamicCache:
            return list(layers)
        for number, layer in enumerate(layers):
            if type(layer) is DynamicLayer:
                # Rows that the model's own cache has begun; it goes on with the same ones.
                layers[number] = GrowingLayer.of(layer, self.capacity)
        if not isinstance(vars(self.kv).get(_BESIDE), StatesBeside):
            vars(self.kv)[_BESIDE] = StatesBeside(self.kv)
        return [*layers, vars(self.kv)[_BESIDE]]

    def mark(self) -> None:
        """Marks the end: `rollback` can drop what is appended from now on. Only where `can_roll_back`."""
        self.marked = self.tokens
        with torch.inference_mode():
            for part in self.parts():
                part.mark()
        if self.head is not None:
            self.head.mark()

    def rollback(self, base: int, rows: Sequence[int] = ()) -> None:
        """Drops what was appended since `mark`, when there were `base` tokens, except for `rows`.

        `rows` are ascending and counted from `base`; afterwards they follow one another.
        """
        self.marked = None
        with torch.inference_mode():
            for part in self.parts():
                part.rollback(base, rows)
            if self.head is not None:
                self.head.rollback(rows)
        self.tokens = base + len(rows)

    def restore(self) -> bool:
        """Drops what a pass has appended that was left midway. Returns whether it could; else the cache is invalid.

        Layers of rows have the same end as before; windows and states may have lost what they had.
        """
        own = [] if self.head is None else self.head.kv.layers
        if self.kv is None or not self.can_always_crop() or not all(type(layer) is GrowingLayer for layer in own):
            return False
        self.marked, self.buffer_table = None, None
        with torch.inference_mode():
            for layer in self.kv.layers:
                layer.rollback(self.tokens, ())
            if self.head is not None:
                self.head.rollback(())
                self.head.drop_rows(min(self.head.rows, self.tokens))
        return True

    @property
    def kept_nbytes(self) -> int:
        """Bytes of the states that are kept for a rollback."""
        return sum(part.kept.nbytes for part in self.parts() if getattr(part, "kept", None) is not None)

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
