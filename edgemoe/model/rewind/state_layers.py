"""Layers of a KV cache with states that a token replaces, of every kind that transformers has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.cache_utils import (
    DummyLayer,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from edgemoe.model.rewind.kept_states import Slot, StateLayer, StatePool
from edgemoe.model.row_layers import GrowingLayer, IndexedLayer, WindowLayer

STATES = ("conv_states", "recurrent_states")
"""Attributes of transformers' recurrent layers that hold tensors by number ..."""
FLAGS = ("has_previous_state", "is_conv_states_initialized", "is_recurrent_states_initialized", "conv_kernel_size")
"""... and what is known of each."""


class RecurrentLayer(StateLayer, LinearAttentionLayer):
    """A layer of a recurrent mixer: convolution states and recurrent states, which are replaced in place."""

    def __init__(self, number_of_states: int = 1, pool: StatePool | None = None) -> None:
        """`pool` has the memory of kept states."""
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)
        self.pool = pool or StatePool()

    def slots(self) -> dict[Slot, Any]:
        """See the base class. A state without a token is None."""
        found: dict[Slot, Any] = {}
        for number, filled in self.has_previous_state.items():
            found["conv_states", number] = self.conv_states[number] if filled else None
            begun = self.is_recurrent_states_initialized[number]
            found["recurrent_states", number] = self.recurrent_states[number] if begun else None
        return found

    def update_recurrent_state(self, recurrent_states: torch.Tensor, state_idx: int = 0, **kwargs: Any) -> torch.Tensor:
        """As transformers' own, which copies into the old state, or with the new one in its place (`StatePool`)."""
        before, new = self.recurrent_states[state_idx], recurrent_states
        if not self._replaces(("recurrent_states", state_idx)) or before is None or before.dtype != new.dtype:
            return LinearAttentionLayer.update_recurrent_state(self, recurrent_states, state_idx, **kwargs)
        whole = new.is_contiguous() and new.untyped_storage().nbytes() == new.nbytes
        # A part of a larger tensor would keep the whole of it.
        kept = new if whole else new.clone(memory_format=torch.contiguous_format)
        self.recurrent_states[state_idx] = kept
        return kept

    def copied(self, slot: Slot, value: Any) -> Any:
        """See the base class."""
        return value if value is None or self._replaces(slot) else self.pool.copy(value)

    def release(self, slot: Slot, kept: Any) -> None:
        """See the base class."""
        if kept is not None and not self._replaces(slot):
            self.pool.give(kept)

    def same(self, slot: Slot, value: Any, kept: Any) -> bool:
        """See the base class: some convolutions write into the state without a call of the layer."""
        if value is None or kept is None:
            return value is kept
        return value is kept or torch.equal(value, kept)

    def put(self, slot: Slot, value: Any) -> None:
        """See the base class. A state that is written into stays where it lies in memory."""
        name, number = slot
        states: dict[Any, Any] = getattr(self, name)
        if name == "conv_states":
            self.has_previous_state[number] = value is not None  # type: ignore[index]
        if states[number] is None:
            return
        if value is None:
            states[number] = torch.zeros_like(states[number])
        elif self._replaces(slot):
            states[number] = value
        else:
            states[number].copy_(value)

    def take(self, slot: Slot, value: Any) -> None:
        """See the base class. The kept state takes the place of the other one, without a copy."""
        name, number = slot
        states: dict[Any, Any] = getattr(self, name)
        if value is None or states[number] is None:
            self.put(slot, value)
        else:
            self.release(slot, states[number])
            states[number] = value

    def _replaces(self, slot: Slot) -> bool:
        return self.pool.replaces and slot[0] == "recurrent_states"


class _BesideRows(RecurrentLayer):
    """States beside the rows of attention, which the class `rows` has."""

    rows: Any

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """As transformers' classes: rows come by position, states by name."""
        (self.rows if args else RecurrentLayer).lazy_initialization(self, *args, **kwargs)

    def reset(self) -> None:
        """Drops rows and states."""
        RecurrentLayer.reset(self)
        self.rows.reset(self)

    def mark(self) -> None:
        """See `StateLayer`."""
        RecurrentLayer.mark(self)
        self.rows.mark(self)

    def rollback(self, base: int, rows: Sequence[int]) -> None:
        """See `StateLayer`."""
        RecurrentLayer.rollback(self, base, rows)
        self.rows.rollback(self, base, rows)


class RecurrentGrowingLayer(_BesideRows, LinearAttentionAndFullAttentionLayer, GrowingLayer):  # type: ignore[misc, override]
    """States beside the rows of full attention."""

    rows = GrowingLayer

    def __init__(self, capacity: int, number_of_states: int = 1, pool: StatePool | None = None) -> None:
        GrowingLayer.__init__(self, capacity)
        RecurrentLayer.__init__(self, number_of_states, pool)

    def fork(self, tokens: int, capacity: int) -> RecurrentGrowingLayer:
        """As `GrowingLayer.fork`, with a copy of the states; `tokens` are all that there are."""
        other = RecurrentGrowingLayer(capacity, self.number_of_states, self.pool)
        self.fill(other, tokens)
        for name in STATES:
            states = getattr(self, name)
            setattr(other, name, {key: None if each is None else each.clone() for key, each in states.items()})
        for name in FLAGS:
            setattr(other, name, dict(getattr(self, name)))
        return other


class RecurrentWindowLayer(  # type: ignore[misc, override]
    _BesideRows, LinearAttentionAndSlidingWindowAttentionLayer, WindowLayer
):
    """States beside the rows of a sliding window."""

    rows = WindowLayer

    def __init__(self, sliding_window: int, number_of_states: int = 1, pool: StatePool | None = None) -> None:
        WindowLayer.__init__(self, sliding_window)
        RecurrentLayer.__init__(self, number_of_states, pool)


class EmptyLayer(DummyLayer):
    """The layer of a block that caches nothing."""

    def mark(self) -> None:
        """Does nothing."""

    def rollback(self, base: int, rows: Sequence[int]) -> None:
        """Does nothing."""


class ReplacedStates(StateLayer):
    """Mixed into a class whose updates make new tensors and leave the old ones as they are: those are kept."""

    def slots(self) -> dict[Slot, Any]:
        """See the base class: every tensor and number, also in a dict or a list."""
        return replaced_slots({name: value for name, value in vars(self).items() if name != "kept"})

    def put(self, slot: Slot, value: Any) -> None:
        """See the base class."""
        put_replaced(vars(self), slot, value)


class StatesBeside(StateLayer):
    """The states that a model's own kind of cache keeps outside of its layers."""

    def __init__(self, cache: Any) -> None:
        """`cache` replaces these states and does not write into them."""
        self._cache = cache

    def slots(self) -> dict[Slot, Any]:
        """See the base class."""
        return replaced_slots({name: value for name, value in vars(self._cache).items() if name != "layers"})

    def put(self, slot: Slot, value: Any) -> None:
        """See the base class."""
        put_replaced(vars(self._cache), slot, value)


class CroppedRows:
    """Mixed into a class of rows that can crop itself."""

    def mark(self) -> None:
        """Does nothing: rows can always be cropped."""

    def rollback(self: Any, base: int, rows: Sequence[int]) -> None:
        """Keeps the first `base` rows and the `rows`, which must be the first ones behind them."""
        dropped = self.get_seq_length() - base - len(rows) if self.is_initialized else 0
        if dropped > 0:
            self.crop(-dropped)


def replaced_slots(values: dict[str, Any]) -> dict[Slot, Any]:
    """The tensors and numbers among an object's attributes, also in dicts and lists."""
    found: dict[Slot, Any] = {}
    for name, value in values.items():
        inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        found |= {(name, key): each for key, each in inner}
        if isinstance(value, (torch.Tensor, int)):
            found[name, None] = value
    return found


def put_replaced(values: dict[str, Any], slot: Slot, value: Any) -> None:
    """Makes `value` that of a slot of `replaced_slots`."""
    name, key = slot
    if key is None:
        values[name] = value
    else:
        values[name][key] = value


_MIXED: dict[tuple[type, type], Any] = {}


def mixed(mixin: type, base: type) -> Any:
    """`base` with the methods of `mixin`; transformers does not register it for the kind of layer of `base`."""
    if (mixin, base) not in _MIXED:
        _MIXED[mixin, base] = type(f"{mixin.__name__}{base.__name__}", (mixin, base), {"_layer_type": None})
    return _MIXED[mixin, base]


def own_layer(layer: Any, capacity: int, pool: StatePool) -> Any:
    """An empty layer as `layer`, one of transformers', that can be rolled back; `pool` has the memory for states."""
    make: dict[type, Callable[[], Any]] = {
        DynamicLayer: lambda: GrowingLayer(capacity),
        DynamicSlidingWindowLayer: lambda: WindowLayer(layer.sliding_window),
        DynamicIndexedLayer: lambda: IndexedLayer(capacity),
        DummyLayer: EmptyLayer,
        LinearAttentionLayer: lambda: RecurrentLayer(layer.number_of_states, pool),
        LinearAttentionAndFullAttentionLayer: lambda: RecurrentGrowingLayer(capacity, layer.number_of_states, pool),
        LinearAttentionAndSlidingWindowAttentionLayer: lambda: RecurrentWindowLayer(
            layer.sliding_window, layer.number_of_states, pool
        ),
    }
    if type(layer) in make:
        return make[type(layer)]()
    if not isinstance(layer, LinearAttentionCacheLayerMixin):
        mixin = CroppedRows if layer.is_croppable and not layer.is_sliding else ReplacedStates
        kind = mixed(mixin, type(layer))
        made = kind.__new__(kind)
        vars(made).update(vars(layer))
        return made
    return layer
