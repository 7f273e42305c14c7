"""Prefetches beside demand loads: when they start, what they may evict, how they end, and how they are counted."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from bench.support.policies.lru import BalancedLRU
from edgemoe.cache import ExpertCache, ExpertId
from tests.support.cache_fakes import holds
from tests.support.driven_cache import NBYTES, free_slots, ids, link_of, make, prefetched, use


def unrequested(cache: ExpertCache) -> int:
    """Bytes of prefetches without a request, in flight or arrived."""
    return NBYTES * sum(held.load_reason is not None for held in cache._held.values())


def mark(cache: ExpertCache, and_then: Callable[[], object] = lambda: None) -> Callable[[], None]:
    """A `meanwhile` that adds an event to the link's log, then calls `and_then`."""

    def meanwhile() -> None:
        link_of(cache).events.append(("meanwhile", None))
        and_then()

    return meanwhile


# --- meanwhile -------------------------------------------------------------------------------------


@pytest.mark.parametrize("hits", [[], [3, 5]])
def test_it_is_called_after_the_demanded_loads_have_started_and_before_the_first_loan(hits: list[int]) -> None:
    cache = make(6)
    use(cache, 0, *hits)
    link = link_of(cache)
    link.events.clear()
    borrowed = cache.borrow(0, [1, *hits, 2], mark(cache))
    assert link.events == [], "nothing happens before the first iteration"
    first = next(borrowed)
    assert first.experts == (tuple(hits) or (1,))
    waited = [] if hits else [("wait", tuple(ids(0, 1, 2)))]
    assert [event for event in link.events if event[1] != ()] == [
        ("start", (0, 1)),
        ("start", (0, 2)),
        ("meanwhile", None),
        *waited,
    ]
    borrowed.close()


def test_it_is_called_once_however_many_loans_there_are() -> None:
    cache = make(2)
    assert len(list(cache.borrow(0, range(8), mark(cache)))) >= 4
    use(cache, 1, 0, 1)
    list(cache.borrow(1, [0, 1], mark(cache)))
    assert len(link_of(cache).happened("meanwhile")) == 2


def test_a_late_prefetch_is_promoted_before_it_is_called() -> None:
    cache = make(4)
    cache.prefetch(ids(0, 3))
    link = link_of(cache)
    list(cache.borrow(0, [3], mark(cache)))
    assert [event for event, _ in link.events] == ["prefetch", "promote", "meanwhile", "wait", "released", "released"]


def test_its_error_releases_every_pin() -> None:
    cache = make(3)
    use(cache, 0, 0, 1)

    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(cache.borrow(0, [0, 1, 2], fail))
    cache.check_integrity()
    link_of(cache).finish(ExpertId(0, 2))
    use(cache, 1, 0, 1, 2)
    assert cache.residents(0) == []


def test_a_prefetch_made_meanwhile_is_behind_the_demands_and_takes_what_the_pass_does_not_use() -> None:
    cache = make(4)
    use(cache, 0, 7)
    use(cache, 0, 1, 2)
    link = link_of(cache)
    link.events.clear()
    list(cache.borrow(0, [1, 2, 3], mark(cache, lambda: cache.prefetch(ids(1, 0, 1)))))
    assert [event for event in link.events if event[0] in ("start", "prefetch")] == [
        ("start", (0, 3)),
        ("prefetch", (1, 0)),
    ]
    assert sorted(cache.residents(0)) == [1, 2, 3]


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_while_more_are_wanted_than_there_are_slots_nothing_is_brought(slots: int) -> None:
    cache = make(slots)
    started = []
    for _ in range(2):
        list(cache.borrow(0, range(8), lambda: started.append(cache.prefetch(ids(1, 0)))))
    assert started == [0, 0]


@pytest.mark.parametrize("seed", range(6))
def test_random_prefetches_made_meanwhile_disturb_no_pass(seed: int) -> None:
    """Pinned experts keep their slots, records are right, and bytes are counted once."""
    draw = random.Random(seed)
    experts = (6, 4, 9)
    everyone = [ExpertId(layer, number) for layer, count in enumerate(experts) for number in range(count)]
    slots = draw.choice([3, 7, 12])
    cache = make(slots, experts, BalancedLRU(len(experts), slots))
    link = link_of(cache)
    link.choose = lambda transfers: draw.choice(list(transfers))

    def meanwhile() -> None:
        pinned = {expert: held.slot for expert, held in cache._held.items() if held.pins}
        demanded = [event for event in link.events if event[0] == "start"]
        cache.prefetch(draw.sample(everyone, 4), draw.sample(everyone, 3))
        assert {expert: cache._held[expert].slot for expert in pinned} == pinned
        assert [event for event in link.events if event[0] == "start"] == demanded
        cache.cancel_prefetches(draw.sample(everyone, 4))
        cache.check_integrity()

    for step in range(120):
        layer = step % len(experts)
        for expert in [expert for expert in link.in_flight if draw.random() < 0.3]:
            link.finish(expert)
        link.queued = {expert for expert in everyone if draw.random() < 0.5}
        requested = draw.sample(range(experts[layer]), draw.randint(1, experts[layer]))
        seen: list[int] = []
        for loan in cache.borrow(layer, requested, meanwhile):
            for number, slot in zip(loan.experts, loan.slots, strict=True):
                assert holds(cache.region(layer).memory[slot], ExpertId(layer, number), NBYTES)
            seen += loan.experts
        assert sorted(seen) == sorted(requested)
        cache.check_integrity()
    link.finish(*link.in_flight)
    assert link.happened("cancel")
    assert cache.counters.bytes_loaded + unrequested(cache) == link.moved


# --- cancelling ------------------------------------------------------------------------------------


def test_what_has_not_moved_is_called_off_and_its_slot_is_free() -> None:
    cache = make(4)
    cache.prefetch(ids(0, 0, 1, 2))
    link_of(cache).queued = set(ids(0, 0, 2))
    cache.cancel_prefetches(ids(0, 0, 1, 5))
    assert link_of(cache).happened("cancel") == ids(0, 0)
    assert [cache.holds(expert) for expert in ids(0, 0, 1, 2)] == [False, True, True]
    assert free_slots(cache) == 2
    cache.check_integrity()


def test_what_was_called_off_can_be_loaded_again_and_only_that_is_counted() -> None:
    cache = make(2)
    link = link_of(cache)
    for _ in range(3):
        assert cache.prefetch(ids(0, 0, 1)) == 2
        link.queued = set(ids(0, 0, 1))
        cache.cancel_prefetches(ids(0, 0, 1))
    assert (link.moved, cache.counters.bytes_loaded, unrequested(cache)) == (0, 0, 0)
    use(cache, 0, 0, 1)
    assert link.moved == NBYTES * 2 == cache.counters.bytes_demanded == cache.counters.bytes_loaded


def test_what_has_arrived_is_not_called_off() -> None:
    cache = make(2)
    prefetched(cache, 0, 0)
    link_of(cache).queued = set(ids(0, 0))
    cache.cancel_prefetches(ids(0, 0))
    assert cache.residents(0) == [0]


def test_what_was_asked_for_is_not_called_off() -> None:
    """A late prefetch that a pass waits for, and a demand load that outlived its borrower."""
    cache = make(3)
    link = link_of(cache)
    cache.prefetch(ids(0, 0))
    link.queued = set(ids(0, 0, 1, 2))
    borrowed = cache.borrow(0, [0, 1, 2], mark(cache, lambda: cache.cancel_prefetches(ids(0, 0, 1, 2))))
    next(borrowed)
    borrowed.close()
    cache.cancel_prefetches(ids(0, 0, 1, 2))
    assert link.happened("cancel") == []
    assert all(map(cache.holds, ids(0, 0, 1, 2)))


# --- prefetches in flight --------------------------------------------------------------------------


def test_prefetches_on_the_way_are_counted_until_they_arrive_fail_or_are_asked_for() -> None:
    cache = make(8)
    link = link_of(cache)
    assert cache.prefetching == 0
    cache.prefetch(ids(0, 0, 1, 2, 3))
    assert cache.prefetching == 4
    link.finish(ExpertId(0, 0))
    assert cache.prefetching == 3, "arrived"
    link.faults[ExpertId(0, 1)] = OSError("disk gone")
    link.finish(ExpertId(0, 1))
    assert cache.prefetching == 2, "failed"
    counts: list[int] = []
    list(cache.borrow(0, [2, 5], lambda: counts.append(cache.prefetching)))
    assert counts == [1], "one was requested, and a demand load does not count"
    link.queued = set(ids(0, 3))
    cache.cancel_prefetches(ids(0, 3))
    assert cache.prefetching == 0


def test_a_load_that_follows_one_that_was_called_off_is_not_taken_for_it() -> None:
    cache = make(2)
    cache.prefetch(ids(0, 0))
    link_of(cache).queued = set(ids(0, 0))
    cache.cancel_prefetches(ids(0, 0))
    counts: list[int] = []
    list(cache.borrow(0, [0], lambda: counts.append(cache.prefetching)))
    assert counts == [0]


# --- failures --------------------------------------------------------------------------------------


def test_a_load_that_is_failing_keeps_its_slot_until_nothing_writes_it_any_more() -> None:
    """One of its pieces failed while others are in flight: another load into the slot would race with those."""
    cache = make(1)
    link = link_of(cache)
    cache.prefetch(ids(0, 0))
    link.in_flight[ExpertId(0, 0)][0].error = link.faults[ExpertId(0, 0)] = OSError("disk gone")
    with pytest.raises(OSError, match="disk gone"):
        use(cache, 0, 0)
    assert link.happened("start") == []
    use(cache, 0, 0)
    assert link.happened("start") == ids(0, 0)


def test_a_requested_expert_that_is_prefetched_meanwhile_is_loaded_once() -> None:
    cache = make(2)
    link = link_of(cache)
    cache.fill(ids(1, 0))

    def meanwhile() -> None:
        link.finish(ExpertId(1, 0))
        cache.prefetch(ids(0, 1))

    assert sorted(number for loan in cache.borrow(0, [0, 1], meanwhile) for number in loan.experts) == [0, 1]
    assert link.happened("prefetch") == [ExpertId(1, 0), ExpertId(0, 1)]
    assert link.happened("start") == [ExpertId(0, 0)]


@pytest.mark.parametrize("reason", ["demand", "prefetch"])
def test_a_load_that_is_failing_is_not_evicted_for_another(reason: str) -> None:
    cache = make(1)
    link = link_of(cache)
    failing = ExpertId(0, 0)
    cache.fill([failing])
    link.in_flight[failing][0].error = link.faults[failing] = OSError("disk gone")
    if reason == "demand":
        use(cache, 0, 1)
        happened = [what for what in link.events if what[0] in ("wait", "start")]
        assert happened == [("wait", (failing,)), ("start", ExpertId(0, 1)), ("wait", (ExpertId(0, 1),))]
    else:
        assert cache.prefetch(ids(0, 1)) == 0
        link.finish(failing)
        assert cache.prefetch(ids(0, 1)) == 1, "now nothing writes the slot"
