"""One sequence's past: its keys, values and states, with the room that they may take; copied, cut and grown."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from edgemoe.kv_cache import GrowingLayer, WindowLayer, new_cache

ROOM_STEP = 64
"""Tokens; room grows in multiples of this, and by at least an eighth, so that growing copies little."""


class Past:
    """What a model remembers of one sequence of `tokens` tokens.

    `cache` is None until the first pass where a model makes its own. `room` is how many tokens it has
    buffers for, which is what it is charged with.
    """

    def __init__(self, cache: Any, room: int, tokens: int = 0) -> None:
        self.cache = cache
        self.room = room
        self.tokens = tokens

    @classmethod
    def empty(cls, model: Any, room: int) -> Past:
        """The past of a sequence that has not begun."""
        return cls(new_cache(model, room), room)

    def make_room(self, room: int) -> None:
        """Lets the buffers grow to `room` tokens when they need to."""
        self.room = max(self.room, room)
        for layer in getattr(self.cache, "layers", ()):
            if isinstance(layer, GrowingLayer):
                layer.room = self.room

    def can_cut(self) -> bool:
        """Whether any number of the last tokens may be forgotten: all of it is rows, and no window has dropped one."""
        return type(self.cache) is DynamicCache and all(map(_keeps_all_rows, self.cache.layers))

    def can_always_cut(self) -> bool:
        """Whether that stays so however long it gets: no layer has a window or a state."""
        return type(self.cache) is DynamicCache and all(type(layer) is GrowingLayer for layer in self.cache.layers)

    def cut(self, tokens: int) -> None:
        """Forgets all but the first `tokens`; only where `can_cut`."""
        for layer in self.cache.layers:
            layer.crop(tokens - self.tokens)
        self.tokens = tokens

    @property
    def can_draft(self) -> bool:
        """Whether tokens may be appended on trial: all of it is rows, which `keep` can drop again."""
        return type(self.cache) is DynamicCache and all(
            type(layer) in (GrowingLayer, WindowLayer) for layer in self.cache.layers
        )

    def draft(self) -> None:
        """Marks the present end: what is appended now stays only as far as `keep` says. Only where `can_draft`."""
        for layer in self.cache.layers:
            layer.draft()

    def keep(self, base: int, rows: Sequence[int] = ()) -> None:
        """Keeps the `base` tokens that there were at `draft` and, of those appended since, the ones at `rows`.

        `rows` are ascending and counted from `base`; afterwards they follow one another.
        """
        with torch.inference_mode():
            for layer in self.cache.layers:
                layer.keep(base, rows)
        self.tokens = base + len(rows)

    def fork(self, tokens: int, room: int) -> Past:
        """A copy of the first `tokens` tokens with room for `room`. Fewer than all only where `can_cut`."""
        if tokens < self.tokens and not self.can_cut():
            raise ValueError(f"a past that cannot be cut has {self.tokens} tokens, not {tokens}")
        self.trim()
        with torch.inference_mode():
            return Past(self._copied(tokens, room), room, tokens)

    def trim(self) -> None:
        """Gives back the memory of rows that windows have dropped: those kept are views of the last chunk's."""
        with torch.inference_mode():
            for layer in getattr(self.cache, "layers", ()):
                if not isinstance(layer, GrowingLayer):
                    _own(vars(layer))

    def _copied(self, tokens: int, room: int) -> Any:
        if type(self.cache) is not DynamicCache:
            return copy.deepcopy(self.cache)
        other: Any = copy.copy(self.cache)
        other.layers = []
        for layer in self.cache.layers:
            if isinstance(layer, GrowingLayer):
                # It leaves out the rows that would be cut at once.
                other.layers.append(layer.fork(tokens, room))
            else:
                other.layers.append(copy.deepcopy(layer))
                if tokens < self.tokens:
                    other.layers[-1].crop(tokens - self.tokens)
        return other


def room_for(tokens: int, limit: int) -> int:
    """The room that a sequence of `tokens` tokens is given, when it will have at most `limit`."""
    wanted = max(tokens + tokens // 8, tokens + 1)
    return max(tokens, min(limit, -(-wanted // ROOM_STEP) * ROOM_STEP))


def _own(values: dict[Any, Any]) -> None:
    """Puts a copy in the place of every tensor that is a part of a larger one."""
    for name, value in values.items():
        if isinstance(value, torch.Tensor) and value.untyped_storage().nbytes() > value.nbytes:
            values[name] = value.clone()
        elif isinstance(value, dict):
            _own(value)


def _keeps_all_rows(layer: Any) -> bool:
    if type(layer) is WindowLayer:
        return bool(layer.get_seq_length() < layer.sliding_window)
    return type(layer) is GrowingLayer
