"""The slots that a prefetch may take, and its outcomes."""

from __future__ import annotations

import pytest

from edgemoe.cache import ExpertCache, ExpertId
from tests.support.driven_cache import NBYTES, free_slots, ids, link_of, make, prefetched, use


def test_free_slots_are_taken_first() -> None:
    cache = make(4)
    use(cache, 0, 0, 1)
    assert cache.prefetch(ids(1, 0, 1)) == 2
    assert sorted(cache.residents(0)) == [0, 1]
    assert free_slots(cache) == 0
    assert link_of(cache).happened("prefetch") == ids(1, 0, 1)
    assert link_of(cache).happened("wait") == [((0, 0), (0, 1)), ((0, 1),)], "a prefetch waits for nothing"


def test_what_is_there_or_coming_is_not_brought_again() -> None:
    cache = make(4)
    use(cache, 0, 0)
    assert cache.prefetch(ids(0, 0, 1)) == 1
    assert cache.prefetch(ids(0, 1, 0)) == 0
    assert link_of(cache).happened("prefetch") == ids(0, 1)


def test_a_full_cache_gives_what_was_used_the_longest_ago() -> None:
    cache = make(2)
    use(cache, 0, 0)
    use(cache, 0, 1)
    assert cache.prefetch(ids(1, 7)) == 1
    assert cache.residents(0) == [1]


def test_nothing_wanted_sooner_is_evicted() -> None:
    cache = make(2)
    use(cache, 0, 0)
    use(cache, 0, 1)
    assert cache.prefetch(ids(1, 7), needed_sooner=ids(0, 0)) == 1
    assert cache.residents(0) == [0]
    assert cache.prefetch(ids(1, 6), needed_sooner=ids(0, 0)) == 0, "the other slot is being loaded"
    assert cache.residents(0) == [0]


def test_an_expert_of_the_same_prefetch_is_not_evicted_for_another() -> None:
    cache = make(2)
    use(cache, 0, 0)
    use(cache, 0, 1)
    assert cache.prefetch([*ids(1, 7), *ids(0, 0)]) == 1
    assert cache.residents(0) == [0], "1 was evicted although 0 was colder, since 0 is prefetched too"


def test_unused_prefetches_are_not_evicted_by_prefetches() -> None:
    cache = make(2)
    prefetched(cache, 0, 0, 1)
    assert cache.prefetch(ids(1, 0)) == 0
    use(cache, 0, 0)
    assert cache.prefetch(ids(1, 0, 1)) == 1, "only the used one may be evicted"
    assert cache.residents(0) == [1]


def test_it_stops_at_the_first_that_finds_no_slot() -> None:
    cache = make(3)
    use(cache, 0, 0)
    assert cache.prefetch(ids(1, 0, 1, 2, 3), needed_sooner=ids(0, 0)) == 2
    assert link_of(cache).happened("prefetch") == ids(1, 0, 1)


def test_what_is_lent_is_not_evicted() -> None:
    cache = make(2)
    use(cache, 0, 0, 1)
    borrowed = cache.borrow(0, [0, 1])
    next(borrowed)
    assert cache.prefetch(ids(1, 0)) == 0
    borrowed.close()
    assert cache.prefetch(ids(1, 0)) == 1
    cache.check_integrity()


def test_what_is_on_the_link_is_not_evicted_by_a_demand() -> None:
    cache = make(2)
    use(cache, 0, 0)
    cache.prefetch(ids(1, 0))
    use(cache, 0, 1, 2, 3)
    assert free_slots(cache) == 0
    assert list(link_of(cache).in_flight) == ids(1, 0)
    assert len(cache.residents(0)) == 1, "three experts streamed through the other slot"


def test_a_demand_may_evict_an_unused_prefetch() -> None:
    cache = make(1)
    prefetched(cache, 1, 0)
    use(cache, 0, 5)
    assert cache.residents(0) == [5]


def test_a_late_prefetch_is_promoted_and_not_repeated() -> None:
    cache = make(4)
    cache.prefetch(ids(0, 3, 4))
    loans = use(cache, 0, 4, 2)
    assert [loan.experts for loan in loans] == [(4,), (2,)]
    assert link_of(cache).happened("promote") == ids(0, 4)
    assert link_of(cache).happened("start") == ids(0, 2)
    assert list(link_of(cache).in_flight) == ids(0, 3)


def test_a_prefetch_that_arrived_is_a_hit() -> None:
    cache = make(4)
    prefetched(cache, 0, 3)
    assert cache.is_resident(ExpertId(0, 3))
    assert [loan.experts for loan in use(cache, 0, 2, 3)] == [(3,), (2,)]
    assert (cache.counters.hits, cache.counters.misses) == (1, 1)


def test_a_prefetch_on_the_link_is_not_resident() -> None:
    cache = make(4)
    cache.prefetch(ids(0, 3))
    assert not cache.is_resident(ExpertId(0, 3))
    assert cache.residents(0) == []
    assert not cache.is_resident(ExpertId(0, 4))


def test_a_prefetch_that_arrives_while_the_hits_are_sorted_out_is_lent() -> None:
    """It was not yet resident when hits were collected, and no longer missing when misses were: it was lost before."""
    cache = make(4)
    link_of(cache).sudden = True
    cache.prefetch(ids(0, 3, 4))
    link_of(cache).sudden = False
    use(cache, 0, 3, 1, 4)
    assert (cache.counters.hits + cache.counters.misses, cache.counters.bytes_loaded) == (3, link_of(cache).moved)


def test_a_failed_prefetch_harms_nobody_and_a_demand_loads_it_again() -> None:
    cache = make(2)
    link = link_of(cache)
    cache.prefetch(ids(0, 3))
    link.faults[ExpertId(0, 3)] = OSError("disk gone")
    link.finish(ExpertId(0, 3))
    assert not cache.is_resident(ExpertId(0, 3))
    use(cache, 0, 3)
    assert link.happened("start") == ids(0, 3)
    use(cache, 0, 4, 5)


@pytest.mark.parametrize("queued", [(), (0,), (0, 1, 2)], ids=["all-moving", "one-queued", "all-queued"])
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_a_demand_is_served_while_every_slot_waits_for_a_prefetch(slots: int, queued: tuple[int, ...]) -> None:
    """As after start-up: the fills are in flight, and the first token requests other experts."""
    cache = make(slots)
    link = link_of(cache)
    assert cache.prefetch(ids(0, *range(slots))) == slots
    link.queued = set(ids(0, *queued))
    use(cache, 1, 5)
    use(cache, 0, 7, 6, 0)
    link.finish(*link.in_flight)
    unrequested = NBYTES * sum(held.load_reason is not None for held in cache._held.values())
    assert cache.counters.bytes_loaded + unrequested == link.moved


def test_a_demand_calls_off_the_latest_prefetch_of_which_nothing_has_moved() -> None:
    cache = make(3)
    link = link_of(cache)
    cache.prefetch(ids(0, 0, 1, 2))
    link.queued = set(ids(0, 1, 2))
    use(cache, 1, 5)
    assert link.happened("cancel") == ids(0, 2)
    assert [wait for wait in link.happened("wait") if wait != ((1, 5),)] == [], "no wait for a prefetch"
    assert (cache.counters.bytes_demanded, cache.counters.bytes_loaded) == (NBYTES, NBYTES)


def test_a_prefetch_that_is_wanted_now_is_not_called_off() -> None:
    cache = make(2)
    link = link_of(cache)
    cache.prefetch(ids(0, 0, 1))
    link.queued = set(ids(0, 0, 1))
    use(cache, 0, 5, 1)
    assert link.happened("cancel") == ids(0, 0)
    assert link.happened("promote") == ids(0, 1)


def test_a_prefetch_calls_off_no_other() -> None:
    cache = make(1)
    link = link_of(cache)
    cache.prefetch(ids(0, 0))
    link.queued = set(ids(0, 0))
    assert cache.prefetch(ids(1, 0)) == 0
    assert list(link.in_flight) == ids(0, 0)


def test_a_prefetch_that_is_about_to_be_lent_is_not_evicted_for_a_miss_before_it() -> None:
    """It was in flight at its request, so it is promoted, even if it arrives while others are started."""
    cache = make(2)
    link = link_of(cache)
    cache.prefetch(ids(0, 5))
    begin = link.start

    def start(*arguments: object) -> object:
        transfer = begin(*arguments)  # type: ignore[arg-type]
        if ExpertId(0, 5) in link.in_flight:
            link.finish(ExpertId(0, 5))
        return transfer

    link.start = start  # type: ignore[method-assign, assignment]
    use(cache, 0, 1, 2, 5)
    assert link.happened("start").count((0, 5)) == 0
    assert link.moved == 3 * NBYTES == cache.counters.bytes_loaded


# --- filling the slots at the start ------------------------------------------------------------------


def test_filling_takes_free_slots_and_evicts_nothing() -> None:
    cache = make(3)
    use(cache, 0, 0)
    cache.fill(ids(0, 0, 1, 2, 3))
    assert link_of(cache).happened("prefetch") == ids(0, 1, 2)
    assert sorted(cache.residents(0)) == [0]
    assert cache.prefetching == 2, "fills in flight count as prefetches in flight"


def test_what_filled_a_slot_is_no_prefetch_whatever_becomes_of_it() -> None:
    cache = make(3)
    cache.fill(ids(0, 0, 1, 2))
    link_of(cache).finish(*ids(0, 0, 2))
    use(cache, 0, 0, 1)
    use(cache, 1, 5)
    counters = cache.counters
    assert cache.residents(0) == [0, 1], "2 was never used"
    assert counters.bytes_filled == 3 * NBYTES, "used, used late, evicted"
    assert counters.bytes_prefetched_used + counters.bytes_prefetched_late + counters.bytes_prefetched_wasted == 0
    assert counters.bytes_loaded == link_of(cache).moved == 4 * NBYTES
    use(cache, 0, 0, 1)
    assert counters.bytes_filled == 3 * NBYTES, "each byte once"


def test_what_filled_a_slot_makes_room_for_a_prefetch_where_a_prefetch_does_not() -> None:
    cache = make(2)
    cache.fill(ids(0, 0))
    link_of(cache).finish(*ids(0, 0))
    prefetched(cache, 0, 1)
    assert cache.prefetch(ids(1, 7, 6)) == 1
    assert cache.residents(0) == [1]


def test_a_demand_calls_off_what_fills_a_slot() -> None:
    cache = make(2)
    link = link_of(cache)
    cache.fill(ids(0, 0, 1))
    link.queued = set(ids(0, 0, 1))
    use(cache, 1, 5)
    assert link.happened("cancel") == ids(0, 1)
    assert cache.counters.bytes_filled == 0


def on_the_bus(cache: ExpertCache, number: int) -> None:
    """Prefetches an expert of layer 0, whose copy is queued on the device and not over."""
    assert cache.prefetch(ids(0, number)) == 1
    transfer, _ = link_of(cache).in_flight[ExpertId(0, number)]
    transfer.done = True
    transfer.arrived = lambda: False  # type: ignore[method-assign]


def test_what_is_on_the_bus_is_not_evicted() -> None:
    cache = make(2, (3,))
    on_the_bus(cache, 0)
    use(cache, 0, 1)
    use(cache, 0, 2)
    assert cache.holds(ExpertId(0, 0))
    assert not cache.holds(ExpertId(0, 1))


def test_where_everything_is_on_the_bus_a_slot_is_written_behind_what_was_on_its_way_there() -> None:
    cache = make(1, (2,))
    on_the_bus(cache, 0)
    before = len(link_of(cache).events)
    use(cache, 0, 1)
    kinds = [kind for kind, _ in link_of(cache).events[before:]]
    assert kinds[:2] == ["released", "start"], "the copy waits for what the device does with the record before"
