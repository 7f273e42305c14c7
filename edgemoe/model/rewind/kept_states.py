"""States that tokens replace, kept for each token that may have to be taken back.

From `mark` on the owner of states numbers the tokens that are appended, from 0: they are nodes of a draft. It keeps
what it held after each node that was reported to it, and at the mark, which is node -1. `rollback` goes back to one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

MARK = -1
"""The node of what a layer held at the mark."""

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
            nodes = self._nodes.setdefault(slot, {MARK: None})
            if node in nodes:
                owner.release(slot, nodes[node])
            nodes[node] = self._latest[slot] = owner.copied(slot, values[slot])

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


class StateLayer(ABC):
    """What layers with states have in common. A subclass says what its `slots` are."""

    kept: KeptStates | None = None
    """From `mark` to `rollback`."""

    @abstractmethod
    def slots(self) -> dict[Slot, Any]:
        """The values that a token replaces."""

    @abstractmethod
    def put(self, slot: Slot, value: Any) -> None:
        """Makes a kept `value` that of `slot`."""

    def take(self, slot: Slot, value: Any) -> None:
        """As `put` of a value that is kept no longer."""
        self.put(slot, value)

    def copied(self, slot: Slot, value: Any) -> Any:
        """What is kept of the value of `slot`, which stays as it is whatever the layer does."""
        return value

    def release(self, slot: Slot, kept: Any) -> None:  # noqa: B027
        """A value of `slot` that `copied` has given is kept no longer."""

    def same(self, slot: Slot, value: Any, kept: Any) -> bool:
        """Whether `value` is the one that was `kept`."""
        return value is kept or (not isinstance(value, torch.Tensor) and bool(value == kept))

    def mark(self) -> None:
        """Keeps what the layer holds now, until `rollback`."""
        self.kept = KeptStates(self)

    def settle(self, node: int, *, run: bool) -> bool:
        """Keeps what `node` has changed, before another node changes it; whether it has changed all. After `mark`.

        `run` says that it has changed all that it will: nothing is compared, which a device would be waited for.
        """
        assert self.kept is not None
        if run:
            self.kept.keep(self, node, list(self.slots()))
            return True
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
