"""Keeps memory free for other programs: how many slots the expert cache should use as the free memory changes."""

from __future__ import annotations

import time
from collections.abc import Callable

from edgemoe.plan.machine import ram_free

CHECK_SECONDS = 1.0
"""How often the free memory is looked at."""
GROW_SECONDS = 10.0
"""How long the memory must have been enough before slots are used again: other programs take it in steps."""


class MemoryKeeper:
    """Decides how many slots are used. It shrinks the cache at once and lets it grow slowly.

    While less than `keep_free` bytes are free, so many slots are given back that a little more is: a quarter of it, or
    an eighth of the cache where that is less. Once three times that little more is free, slots are used again, half of
    those that would fit at a time, up to the planned ones.
    """

    def __init__(
        self,
        keep_free: int,
        planned: int,
        least: int,
        slot_nbytes: int,
        free: Callable[[], int] = ram_free,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`planned` and `least` are the most and the fewest slots; a slot takes `slot_nbytes` bytes."""
        self._keep_free = keep_free
        self._planned = planned
        self._least = min(least, planned)
        self._slot_nbytes = slot_nbytes
        self._free = free
        self._clock = clock
        self._margin = min(keep_free // 4, planned * slot_nbytes // 8)
        self._next = 0.0
        self._short_until = 0.0

    def with_planned(self, planned: int) -> MemoryKeeper:
        """As this one for another number of planned slots."""
        return MemoryKeeper(self._keep_free, planned, self._least, self._slot_nbytes, self._free, self._clock)

    def wanted(self, slots: int) -> int:
        """How many slots should be used, where `slots` are now; the same between two looks at the memory."""
        now = self._clock()
        if now < self._next:
            return slots
        self._next = now + CHECK_SECONDS
        free = self._free()
        if free < self._keep_free:
            self._short_until = now + GROW_SECONDS
            short = self._keep_free + self._margin - free
            return min(slots, max(self._least, slots - -(-short // self._slot_nbytes)))
        if slots >= self._planned or now < self._short_until:
            return slots
        spare = (free - self._keep_free - 2 * self._margin) // self._slot_nbytes
        return min(self._planned, slots + max(0, (spare + 1) // 2))
