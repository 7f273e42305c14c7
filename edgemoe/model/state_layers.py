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


class StatePool:
    """Memory for copies of states, which goes back to it: tokens are taken back in every step.

    Copies into new memory would cost more than the states' arithmetic, since the system clears it first.
    """

    def __init__(self) -> None:
        self.replaces = False
        """Whether recurrent states are replaced by new tensors, so that the old ones are kept without a copy.

        Only where mixers do not write into them, and read them anew for each token (`recurrent_mixers`).
        """
        self._free: dict[object, list[torch.Tensor]] = {}

    def copy(self, value: torch.Tensor) -> torch.Tensor:
        """A copy of `value` that belongs to the caller."""
        free = self._free.get((value.shape, value.dtype, value.device))
        return (free.pop() if free else torch.empty_like(value)).copy_(value)

    def give(self, value: torch.Tensor) -> None:
        """Takes a tensor that nothing reads any more."""
        self._free.setdefault((value.shape, value.dtype, value.device), []).append(value)

    def __deepcopy__(self, memo: object) -> StatePool:
        """Itself: copies of a layer share it."""
        return self


class KeptStates:
    """What an owner of states held after each node, slot by slot: a slot that did not change is kept once."""

    def __init__(self, owner: Any) -> None:
        """Keeps what `owner` holds now as that of the mark."""
        self._nodes: dict[Slot, dict[int, Any]] = {
            slot: {MARK: owner.copied(slot, value)} for slot, value in owner.slots().items()
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
            nodes[node] = self._latest[slot] = owner.copied(slot, value)
        return whole

    def keep(self, owner: Any, node: int, slots: Sequence[Slot]) -> None:
        """Keeps the values of `slots` as those after `node`, whether it has changed them or not."""
        values = owner.slots()
        for slot in slots:
            self._nodes[slot][node] = self._latest[slot] = owner.copied(slot, values[slot])

    def go_back(self, owner: Any, node: int, slots: Sequence[Slot] = ()) -> None:
        """Gives `owner` the values after `node`, of all slots or of `slots`; they stay kept."""
        for slot in slots or self._nodes:
            nodes = self._nodes[slot]
            before = max(each for each in nodes if each <= node)
            owner.put(slot, nodes[before])
            self._latest[slot] = nodes[before]

    def end(self, owner: Any, node: int) -> None:
        """As `go_back` for the last time: nothing is kept any more."""
        for slot, nodes in self._nodes.items():
            value = nodes.pop(max(each for each in nodes if each <= node))
            owner.take(slot, value)
            for other in nodes.values():
                if other is not value:
                    owner.release(slot, other)
        self._nodes, self._latest = {}, {}

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

    def take(self, slot: Slot, value: Any) -> None:
        """As `put` of a value that is kept no longer."""
        self.put(slot, value)

    def copied(self, slot: Slot, value: Any) -> Any:
        """What is kept of the value of `slot`, which stays as it is whatever the layer does."""
        return value

    def release(self, slot: Slot, kept: Any) -> None:
        """A value of `slot` that `copied` has given is kept no longer."""

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
            self.kept.end(self, rows[-1] if rows else MARK)
        self.kept = None


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
        self.recurrent_states[state_idx] = new if whole else new.clone(memory_format=torch.contiguous_format)
        return self.recurrent_states[state_idx]

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


class RecurrentGrowingLayer(RecurrentLayer, LinearAttentionAndFullAttentionLayer, GrowingLayer):  # type: ignore[misc, override]
    """States beside the rows of full attention."""

    def __init__(self, capacity: int, number_of_states: int = 1, pool: StatePool | None = None) -> None:
        GrowingLayer.__init__(self, capacity)
        RecurrentLayer.__init__(self, number_of_states, pool)

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
        other = RecurrentGrowingLayer(capacity, self.number_of_states, self.pool)
        self.fill(other, tokens)
        for name in STATES:
            states = getattr(self, name)
            setattr(other, name, {key: None if each is None else each.clone() for key, each in states.items()})
        for name in FLAGS:
            setattr(other, name, dict(getattr(self, name)))
        return other


class RecurrentWindowLayer(  # type: ignore[misc, override]
    RecurrentLayer, LinearAttentionAndSlidingWindowAttentionLayer, WindowLayer
):
    """States beside the rows of a sliding window."""

    def __init__(self, sliding_window: int, number_of_states: int = 1, pool: StatePool | None = None) -> None:
        WindowLayer.__init__(self, sliding_window)
        RecurrentLayer.__init__(self, number_of_states, pool)

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
