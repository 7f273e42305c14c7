"""Layers of a KV cache with states that a token replaces: kept for each token that may have to be taken back.

From `mark` on a layer numbers the tokens that are appended, from 0: they are nodes of a draft. It keeps what it held
after each node that was reported to it, and at the mark, which is node -1. `rollback` goes back to one of these.
"""

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

from edgemoe.model.row_layers import GrowingLayer, IndexedLayer, WindowLayer

MARK = -1
"""The node of what a layer held at the mark."""

STATES = ("conv_states", "recurrent_states")
"""Attributes of transformers' recurrent layers that hold tensors by number ..."""
FLAGS = ("has_previous_state", "is_conv_states_initialized", "is_recurrent_states_initialized", "conv_kernel_size")
"""... and what is known of each."""

Slot = tuple[str, object]
"""One value of a layer: an attribute's name, and a key where the attribute is a dict or a list, else None."""


class KeptStates:
    """What an owner of states held after each node, slot by slot: a slot that did not change is kept once."""

    def __init__(self, owner: Any) -> None:
        """Keeps what `owner` holds now as that of the mark."""
        self._nodes: dict[Slot, dict[int, Any]] = {
            slot: {MARK: owner.copied(value)} for slot, value in owner.slots().items()
        }
        self._latest = {slot: nodes[MARK] for slot, nodes in self._nodes.items()}

    def settle(self, owner: Any, node: int) -> bool:
        """Keeps, as those after `node`, the values of `owner` that are not the ones kept last.

        Returns whether `node` has changed all that there is.
        """
        whole = True
        for slot, value in owner.slots().items():
            nodes = self._nodes.setdefault(slot, {MARK: None})
            if node in nodes or value is None:
                continue
            if slot in self._latest and owner.same(slot, value, self._latest[slot]):
                whole = False
                continue
            nodes[node] = self._latest[slot] = owner.copied(value)
        return whole

    def keep(self, owner: Any, node: int, slots: Sequence[Slot]) -> None:
        """Keeps the values of `slots` as those after `node`, whether it has changed them or not."""
        values = owner.slots()
        for slot in slots:
            self._nodes[slot][node] = self._latest[slot] = owner.copied(values[slot])

    def go_back(self, owner: Any, node: int, slots: Sequence[Slot] = ()) -> None:
        """Gives `owner` the values after `node`, of all slots or of `slots`; they stay kept."""
        for slot in slots or self._nodes:
            nodes = self._nodes[slot]
            before = max(each for each in nodes if each <= node)
            owner.put(slot, nodes[before])
            self._latest[slot] = nodes[before]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that are kept, each counted once."""
        values = [value for nodes in self._nodes.values() for value in nodes.values()]
        tensors = {id(value): value for value in values if isinstance(value, torch.Tensor)}
        return sum(tensor.nbytes for tensor in tensors.values())


class StateLayer:
    """What layers with states have in common. A subclass says what its `slots` are."""

    kept: KeptStates | None = None
    """From `mark` to `rollback`."""

    def slots(self) -> dict[Slot, Any]:
        """The values that a token replaces."""
        raise NotImplementedError

    def put(self, slot: Slot, value: Any) -> None:
        """Makes a kept `value` that of `slot`."""
        raise NotImplementedError

    def copied(self, value: Any) -> Any:
        """What is kept of a value, which stays as it is whatever the layer does."""
        return value

    def same(self, slot: Slot, value: Any, kept: Any) -> bool:
        """Whether `value` is the one that was `kept`."""
        return value is kept or (not isinstance(value, torch.Tensor) and bool(value == kept))

    def mark(self) -> None:
        """Keeps what the layer holds now, until `rollback`."""
        self.kept = KeptStates(self)

    def settle(self, node: int) -> bool:
        """Keeps what `node` has changed, before another node changes it; whether it has changed all. After `mark`."""
        assert self.kept is not None
        return self.kept.settle(self, node)

    def go_back(self, node: int) -> None:
        """Makes the next token follow `node`. Only after `mark`."""
        assert self.kept is not None
        self.kept.go_back(self, node)

    def rollback(self, base: int, rows: Sequence[int]) -> None:
        """Goes back to the last node of `rows`, or the mark where there is none, and keeps nothing any more."""
        if self.kept is not None:
            self.kept.go_back(self, rows[-1] if rows else MARK)
        self.kept = None


class RecurrentLayer(StateLayer, LinearAttentionLayer):
    """A layer of a recurrent mixer: convolution states and recurrent states, which are replaced in place."""

    def __init__(self, number_of_states: int = 1) -> None:
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)

    def slots(self) -> dict[Slot, Any]:
        """See the base class. A state without a token is None."""
        found: dict[Slot, Any] = {}
        for number, filled in self.has_previous_state.items():
            found["conv_states", number] = self.conv_states[number] if filled else None
            begun = self.is_recurrent_states_initialized[number]
            found["recurrent_states", number] = self.recurrent_states[number] if begun else None
        return found

    def copied(self, value: Any) -> Any:
        """See the base class."""
        return None if value is None else value.clone()

    def same(self, slot: Slot, value: Any, kept: Any) -> bool:
        """See the base class: some convolutions write into the state without a call of the layer."""
        if value is None or kept is None:
            return value is kept
        return torch.equal(value, kept)

    def put(self, slot: Slot, value: Any) -> None:
        """See the base class. A state stays where it lies in memory."""
        name, number = slot
        states: dict[Any, Any] = getattr(self, name)
        if name == "conv_states":
            self.has_previous_state[number] = value is not None  # type: ignore[index]
        if states[number] is None:
            return
        if value is None:
            states[number].zero_()
        else:
            states[number].copy_(value)


class RecurrentGrowingLayer(RecurrentLayer, LinearAttentionAndFullAttentionLayer, GrowingLayer):  # type: ignore[misc, override]
    """States beside the rows of full attention."""

    def __init__(self, capacity: int, number_of_states: int = 1) -> None:
        GrowingLayer.__init__(self, capacity)
        RecurrentLayer.__init__(self, number_of_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """As transformers' class: rows come by position, states by name."""
        (GrowingLayer if args else RecurrentLayer).lazy_initialization(self, *args, **kwargs)

    def reset(self) -> None:
        """Drops rows and states."""
        RecurrentLayer.reset(self)
        GrowingLayer.reset(self)

    def mark(self) -> None:
        """See `StateLayer`."""
        RecurrentLayer.mark(self)

    def rollback(self, base: int, rows: Sequence[int]) -> None:
        """See `StateLayer`."""
        RecurrentLayer.rollback(self, base, rows)
        GrowingLayer.rollback(self, base, rows)

    def fork(self, tokens: int, capacity: int) -> RecurrentGrowingLayer:
        """As `GrowingLayer.fork`, with a copy of the states; `tokens` are all that there are."""
        other = RecurrentGrowingLayer(capacity, self.number_of_states)
        self.fill(other, tokens)
        for name in STATES:
            setattr(other, name, {key: self.copied(value) for key, value in getattr(self, name).items()})
        for name in FLAGS:
            setattr(other, name, dict(getattr(self, name)))
        return other


class RecurrentWindowLayer(  # type: ignore[misc, override]
    RecurrentLayer, LinearAttentionAndSlidingWindowAttentionLayer, WindowLayer
):
    """States beside the rows of a sliding window."""

    def __init__(self, sliding_window: int, number_of_states: int = 1) -> None:
        WindowLayer.__init__(self, sliding_window)
        RecurrentLayer.__init__(self, number_of_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """As transformers' class: rows come by position, states by name."""
        (WindowLayer if args else RecurrentLayer).lazy_initialization(self, *args, **kwargs)

    def reset(self) -> None:
        """Drops rows and states."""
        RecurrentLayer.reset(self)
        WindowLayer.reset(self)

    def mark(self) -> None:
        """See `StateLayer`."""
        RecurrentLayer.mark(self)
        WindowLayer.mark(self)

    def rollback(self, base: int, rows: Sequence[int]) -> None:
        """See `StateLayer`."""
        RecurrentLayer.rollback(self, base, rows)
        WindowLayer.rollback(self, base, rows)


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


def own_layer(layer: Any, capacity: int) -> Any:
    """An empty layer as `layer`, one of transformers', that can be rolled back."""
    make: dict[type, Callable[[], Any]] = {
        DynamicLayer: lambda: GrowingLayer(capacity),
        DynamicSlidingWindowLayer: lambda: WindowLayer(layer.sliding_window),
        DynamicIndexedLayer: lambda: IndexedLayer(capacity),
        DummyLayer: EmptyLayer,
        LinearAttentionLayer: lambda: RecurrentLayer(layer.number_of_states),
        LinearAttentionAndFullAttentionLayer: lambda: RecurrentGrowingLayer(capacity, layer.number_of_states),
        LinearAttentionAndSlidingWindowAttentionLayer: lambda: RecurrentWindowLayer(
            layer.sliding_window, layer.number_of_states
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
