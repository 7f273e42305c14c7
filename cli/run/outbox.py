"""Results on their way out: as they finish, or in the order of the input."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

MAX_HELD = 1024
MAX_HELD_NBYTES = 32 << 20


class Outcome(NamedTuple):
    """What came of a request: the line to write, and what to say of it to a person."""

    custom_id: str
    line: bytes
    said: str
    failed: bool = False


class Outbox:
    """Hands each outcome to `deliver`; `in_order`, not before those of all earlier positions, counted from 0."""

    def __init__(self, deliver: Callable[[Outcome], None], *, in_order: bool) -> None:
        self._deliver = deliver
        self._in_order = in_order
        self._held: dict[int, Outcome] = {}
        self._held_nbytes = 0
        self._next = 0

    @property
    def is_full(self) -> bool:
        """Whether so much is held back that nothing more should be begun."""
        return len(self._held) >= MAX_HELD or self._held_nbytes >= MAX_HELD_NBYTES

    def put(self, position: int, outcome: Outcome) -> None:
        """Take one outcome, and deliver what can be. Raises what `deliver` raises."""
        if not self._in_order:
            self._deliver(outcome)
            return
        self._held[position] = outcome
        self._held_nbytes += len(outcome.line)
        while self._next in self._held:
            ready = self._held.pop(self._next)
            self._held_nbytes -= len(ready.line)
            self._next += 1
            self._deliver(ready)
