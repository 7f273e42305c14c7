"""How the cache follows the memory that other programs leave."""

from __future__ import annotations

from edgemoe.plan.memory_keeper import CHECK_SECONDS, GROW_SECONDS, MemoryKeeper

SLOT = 10
KEEP = 1000
MARGIN = 100 * SLOT // 8


class Machine:
    """A clock and free memory that a test sets, and a keeper that looks at both."""

    def __init__(self, planned: int = 100, least: int = 2) -> None:
        self.now, self.free = 100.0, 5000
        self.slots = planned
        self.keeper = MemoryKeeper(KEEP, planned, least, SLOT, lambda: self.free, lambda: self.now)

    def later(self, seconds: float) -> int:
        """Passes time in steps of a check; what the cache gives or takes changes what is free."""
        end = self.now + seconds
        while self.now < end:
            self.now += CHECK_SECONDS
            wanted = self.keeper.wanted(self.slots)
            self.free += (self.slots - wanted) * SLOT
            self.slots = wanted
        return self.slots


def test_with_enough_memory_nothing_changes() -> None:
    machine = Machine()
    assert machine.later(60) == 100


def test_the_cache_gives_what_is_short_and_a_little_more_at_once() -> None:
    machine = Machine()
    machine.free = 800
    assert machine.later(CHECK_SECONDS) == 100 - -(-(KEEP + MARGIN - 800) // SLOT)
    assert machine.free >= KEEP
    assert machine.later(5) == machine.slots


def test_it_never_gives_the_last_slots() -> None:
    machine = Machine()
    machine.free = 0
    machine.keeper.wanted(100)
    assert machine.later(30) >= 2
    machine.free = -5000
    assert machine.later(30) == 2


def test_it_grows_again_but_not_at_once_and_not_into_what_must_stay_free() -> None:
    machine = Machine()
    machine.free = 500
    small = machine.later(2)
    machine.free = 10_000
    assert machine.later(GROW_SECONDS - 3) == small
    assert machine.later(10) == 100
    machine.free = 500
    small = machine.later(2)
    machine.free = KEEP + 100
    assert machine.later(60) == small


def test_two_looks_are_some_time_apart() -> None:
    machine = Machine()
    machine.free = 0
    first = machine.keeper.wanted(100)
    assert first < 100
    assert machine.keeper.wanted(first) == first, "no time has passed"
