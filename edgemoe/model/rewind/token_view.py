"""A KV cache as one of several tokens sees it, which run side by side and reach every layer one after the other."""

from __future__ import annotations

import copy
from typing import Any, SupportsIndex

import torch

from edgemoe.model.kv_cache import SequenceCache


class TokenView:
    """The cache of `sequence` for the token that follows its tokens and `ahead` others of the same run.

    Those run beside it, and reach each layer before it does. What the model asks before that, for positions and masks,
    is answered as if they were through; what it appends goes to the sequence's own layers.
    """

    def __init__(self, sequence: SequenceCache, ahead: int) -> None:
        self._parts = sequence.parts()
        self._beside = self._parts[len(sequence.kv.layers) :]
        length = sequence.tokens + ahead
        self._layers = _TouchedList(_view(layer, length) for layer in sequence.kv.layers)
        kv = copy.copy(sequence.kv)
        kv.layers = self._layers
        self.sequence = SequenceCache(kv, sequence.capacity, length)
        """What a runner appends the token to; not for any other use."""
        self._node = None if sequence.marked is None else length - sequence.marked

    def settle(self, *, whole: bool) -> None:
        """Keeps the states that the token has replaced, before the next token replaces them. Only after a mark.

        `whole` says that the token has run every layer that it has reached: passes wait in no mixer.
        """
        if self._node is None:
            return
        touched, latest = self._layers.touched, self._layers.latest
        for number in sorted(touched):
            settle = getattr(self._parts[number], "settle", None)
            # What a token has left for another layer, it does not come back to.
            if settle is None or settle(self._node, run=whole) or number != latest:
                touched.discard(number)
        for part in self._beside:
            part.settle(self._node, run=False)


class _TouchedList(list[Any]):
    """The layers of a cache, with the numbers of those that were asked for."""

    touched: set[int]
    latest: int

    def __init__(self, layers: Any) -> None:
        super().__init__(layers)
        self.touched, self.latest = set(), -1

    def __getitem__(self, key: SupportsIndex | slice) -> Any:
        if isinstance(key, int):
            self.touched.add(key % len(self) if self else key)
            self.latest = key
        return super().__getitem__(key)


class _LayerView:
    """Mixed into a layer's class: answers for its token. All else is the layer's own, whose attributes it shares.

    Attributes of the view alone are slots of the class that it is mixed into: `view_length`, the tokens before this
    one, and `view_appended`, those that were appended through the view.
    """

    __slots__ = ()

    def get_seq_length(self: Any) -> int:
        """The tokens before this one, and this one once it is appended."""
        return int(self.view_length + self.view_appended)

    def get_mask_sizes(self: Any, query_length: int) -> tuple[int, int]:
        """As the layer in a step of its own."""
        length = self.get_seq_length()
        window = self.sliding_window if self.is_sliding else None
        held = length if window is None else min(window - 1, length)
        return held + query_length, length - held

    def update(self: Any, key_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """As the layer's own; of a window, the rows that a step of its own has."""
        keys, values = super().update(key_states, *args, **kwargs)  # type: ignore[misc]
        count, _ = self.get_mask_sizes(key_states.shape[-2])
        self.view_appended += key_states.shape[-2]
        if keys.shape[-2] > count:
            keys, values = (each[..., -count:, :].contiguous() for each in (keys, values))
        return keys, values


_VIEWS: dict[type, Any] = {}


def _view_of(kind: type) -> Any:
    if kind not in _VIEWS:
        slots = ("view_length", "view_appended")
        _VIEWS[kind] = type(f"{kind.__name__}View", (_LayerView, kind), {"__slots__": slots, "_layer_type": None})
    return _VIEWS[kind]


def _view(layer: Any, length: int) -> Any:
    """`layer` as a token after `length` others sees it."""
    if not hasattr(layer, "get_seq_length"):
        # It holds states alone, which answer no question about lengths.
        return layer
    kind = _view_of(type(layer))
    view = kind.__new__(kind)
    view.__dict__ = layer.__dict__
    view.view_length, view.view_appended = length, 0
    return view
