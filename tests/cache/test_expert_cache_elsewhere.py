"""Experts that the caller computes from their records in RAM: requested like the others, neither loaded nor lent."""

from __future__ import annotations

import pytest

from bench.support.policies.lru import GlobalLRU
from edgemoe.cache.eviction.hot_temporal import HotTemporal
from edgemoe.cache.record import ExpertId
from tests.support.driven_cache import NBYTES, ids, link_of, make, use


def test_they_are_misses_that_move_nothing() -> None:
    cache = make(6)
    use(cache, 0, 3)
    before = cache.counters.copy()
    lent = [loan.experts for loan in cache.borrow(0, [1, 2, 3, 4], elsewhere=[1, 4])]
    assert lent == [(3,), (2,)]
    assert [cache.holds(expert) for expert in ids(0, 1, 2, 3, 4)] == [False, True, True, False]
    counters = cache.counters
    assert (counters.misses - before.misses, counters.hits - before.hits) == (3, 1)
    assert counters.computed_by_cpu == 2
    assert counters.bytes_demanded - before.bytes_demanded == NBYTES
    assert counters.bytes_loaded == link_of(cache).moved
    cache.check_integrity()


def test_the_others_are_on_the_link_before_the_caller_computes_and_nobody_waits_first() -> None:
    cache = make(6)
    link = link_of(cache)
    borrowed = cache.borrow(0, [0, 1, 2], lambda: link.events.append(("meanwhile", None)), elsewhere=[0])
    next(borrowed)
    expected = [("start", (0, 1)), ("start", (0, 2)), ("meanwhile", None), ("wait", tuple(ids(0, 1, 2)))]
    assert [event for event in link.events if event[1] != ()] == expected
    borrowed.close()


@pytest.mark.parametrize("resident", [[], [5]])
def test_without_any_others_to_load_the_caller_computes_and_nothing_is_waited_for(resident: list[int]) -> None:
    cache, calls = make(6), list[int]()
    use(cache, 0, *resident)
    link_of(cache).events.clear()
    loans = list(cache.borrow(0, [0, 1, *resident], lambda: calls.append(1), elsewhere=[0, 1]))
    assert [loan.experts for loan in loans] == [(5,)] * len(resident)
    assert calls == [1]
    assert not link_of(cache).happened("start")
    assert not link_of(cache).happened("wait")


def test_the_policy_and_a_trace_learn_of_all() -> None:
    policy = HotTemporal([8, 8])
    cache = make(6, policy=policy)
    cache.recording = []
    for _ in range(3):
        list(cache.borrow(0, [1, 2], elsewhere=[1]))
    assert cache.recording == [ids(0, 1, 2)] * 3
    heat = policy.heat()
    assert heat[ExpertId(0, 1)] == heat[ExpertId(0, 2)] > 0


def test_an_error_of_the_caller_leaves_nothing_pinned() -> None:
    cache = make(4, policy=GlobalLRU())

    def fail() -> None:
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        list(cache.borrow(0, [0, 1, 2], fail, elsewhere=[0]))
    cache.check_integrity()
    # All slots can be taken again.
    use(cache, 1, 0, 1, 2, 3)
    assert all(held.pins == 0 for held in cache._held.values())
