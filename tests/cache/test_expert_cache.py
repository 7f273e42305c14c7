"""The cache's contract for demand loads, over a fake link."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from bench.support.policies.lru import BalancedLRU
from edgemoe.cache import ExpertId, Transfer
from tests.support.cache_fakes import holds
from tests.support.driven_cache import NBYTES, free_slots, link_of, make, use


def test_a_cache_needs_a_slot() -> None:
    with pytest.raises(ValueError, match="at least 1 slot"):
        make(0)


def test_what_was_loaded_is_resident_and_lent_again_without_the_link() -> None:
    cache = make(4)
    use(cache, 0, 1, 2)
    assert sorted(cache.residents(0)) == [1, 2]
    assert cache.residents(1) == []
    assert free_slots(cache) == 2
    assert link_of(cache).happened("start") == [(0, 1), (0, 2)]
    assert [loan.experts for loan in use(cache, 0, 2, 1)] == [(2, 1)]
    assert len(link_of(cache).happened("start")) == 2


def test_hits_come_first_and_misses_are_on_the_link_before_they_are_lent() -> None:
    cache = make(6)
    use(cache, 0, 3, 5)
    borrowed = cache.borrow(0, [1, 3, 2, 5])
    first = next(borrowed)
    assert first.experts == (3, 5)
    assert link_of(cache).happened("start")[2:] == [(0, 1), (0, 2)], "in the given order, before any hit is computed"
    assert sorted(link_of(cache).in_flight) == [(0, 1), (0, 2)]
    assert sorted(number for loan in borrowed for number in loan.experts) == [1, 2]


def test_misses_are_lent_as_they_arrive() -> None:
    cache = make(4)
    link = link_of(cache)
    link.choose = lambda transfers: transfers[-1]
    assert [loan.experts for loan in use(cache, 0, 1, 2, 3)] == [(3,), (2,), (1,)]


def test_what_arrived_together_is_one_loan_in_the_asked_order() -> None:
    cache = make(4)
    borrowed = cache.borrow(0, [1, 2, 3])
    link = link_of(cache)

    def the_first_after_the_third(transfers: Sequence[Transfer]) -> Transfer:
        link.finish(transfers[2].expert)
        return transfers[0]

    link.choose = the_first_after_the_third
    assert next(borrowed).experts == (1, 3)
    link.choose = lambda transfers: transfers[0]
    assert next(borrowed).experts == (2,)


def test_borrowing_nothing_lends_nothing() -> None:
    cache = make(2)
    assert use(cache, 0) == []
    assert link_of(cache).happened("start") == []


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_more_experts_than_slots_pass_through_them(slots: int) -> None:
    cache = make(slots)
    for _ in range(2):
        loans = use(cache, 0, *range(8))
        assert max(len(loan.slots) for loan in loans) <= slots
    assert cache.counters.misses + cache.counters.hits == 16
    assert len(cache.residents(0)) == slots


def test_hits_are_never_evicted_for_the_misses_beside_them() -> None:
    cache = make(3)
    use(cache, 0, 0, 1, 2)
    loans = use(cache, 0, 5, 0, 6, 1, 7, 2)
    assert loans[0].experts == (0, 1, 2)
    assert cache.counters.hits == 3
    assert link_of(cache).happened("start")[3:] == [(0, 5), (0, 6), (0, 7)]


def test_the_policy_says_who_leaves() -> None:
    cache = make(3)
    use(cache, 0, 0)
    use(cache, 0, 1)
    use(cache, 1, 0)
    use(cache, 0, 0)
    use(cache, 1, 4)
    assert (sorted(cache.residents(0)), sorted(cache.residents(1))) == ([0], [0, 4])


def test_a_pinned_loan_survives_while_others_take_turns() -> None:
    cache = make(2)
    use(cache, 0, 0)
    borrowed = cache.borrow(0, [0, 1, 2, 3])
    hit = next(borrowed)
    assert hit.experts == (0,)
    assert holds(cache.region(0).memory[hit.slots[0]], ExpertId(0, 0), NBYTES)
    seen: list[int] = []
    for loan in borrowed:
        assert all(
            holds(cache.region(0).memory[slot], ExpertId(0, number), NBYTES)
            for number, slot in zip(loan.experts, loan.slots, strict=True)
        )
        seen += loan.experts
    assert sorted(seen) == [1, 2, 3]


def test_closing_early_releases_every_pin() -> None:
    cache = make(4)
    use(cache, 0, 0, 1)
    borrowed = cache.borrow(0, [0, 1, 2, 3])
    next(borrowed)
    borrowed.close()
    cache.check_integrity()
    link_of(cache).finish(ExpertId(0, 2), ExpertId(0, 3))
    use(cache, 1, 0, 1, 2, 3)
    assert cache.residents(0) == [], "all were evicted, so none is pinned"


def test_a_load_that_outlives_its_borrower_is_not_repeated() -> None:
    cache = make(4)
    borrowed = cache.borrow(0, [0, 1])
    next(borrowed)
    borrowed.close()
    assert list(link_of(cache).in_flight) == [(0, 1)]
    use(cache, 0, 0, 1)
    assert link_of(cache).happened("start") == [(0, 0), (0, 1)]


def test_the_link_is_told_when_slots_were_read_for_the_last_time() -> None:
    cache = make(2)
    use(cache, 0, 0)
    link_of(cache).events.clear()
    slots = [loan.slots for loan in use(cache, 0, 0, 1)]
    events = [event for event in link_of(cache).events if event[0] in ("start", "wait", "released") and event[1]]
    assert events == [
        ("start", (0, 1)),
        ("released", slots[0]),
        ("wait", ((0, 1),)),
        ("released", slots[1]),
    ]


def test_a_failed_load_raises_releases_and_is_tried_again() -> None:
    cache = make(3)
    use(cache, 0, 0)
    link_of(cache).faults[ExpertId(0, 1)] = OSError("disk gone")
    borrowed = cache.borrow(0, [0, 1, 2])
    assert next(borrowed).experts == (0,)
    with pytest.raises(OSError, match="disk gone"):
        list(borrowed)
    cache.check_integrity()
    assert not cache.is_resident(ExpertId(0, 1))
    assert sorted(number for loan in use(cache, 0, 0, 1, 2) for number in loan.experts) == [0, 1, 2]
    assert link_of(cache).happened("start").count((0, 1)) == 2
    assert link_of(cache).happened("start").count((0, 2)) == 1, "only the failed load is repeated"
    use(cache, 1, 0, 1, 2)


def test_the_slot_of_a_failed_load_can_be_taken_by_another() -> None:
    cache = make(1)
    link_of(cache).faults[ExpertId(0, 1)] = OSError("disk gone")
    with pytest.raises(OSError, match="disk gone"):
        use(cache, 0, 1)
    use(cache, 1, 4)
    assert cache.residents(1) == [4]


def test_others_that_arrived_beside_a_failure_stay() -> None:
    cache = make(3)
    link = link_of(cache)
    link.faults[ExpertId(0, 1)] = OSError("disk gone")

    def the_second_after_both_others(transfers: Sequence[Transfer]) -> Transfer:
        link.finish(transfers[0].expert, transfers[2].expert)
        return transfers[1]

    link.choose = the_second_after_both_others
    with pytest.raises(OSError, match="disk gone"):
        list(cache.borrow(0, [0, 1, 2]))
    assert sorted(cache.residents(0)) == [0, 2]
    assert use(cache, 0, 0, 2)[0].experts == (0, 2)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("slots", [1, 3, 7])
def test_random_work_keeps_every_law(seed: int, slots: int) -> None:
    """Loans hold the right records, slots add up, and the counters equal the bytes that the link moved."""
    draw = random.Random(seed)
    layers, experts = 3, 6
    cache = make(slots, [experts] * layers, BalancedLRU(layers, slots))
    link = link_of(cache)
    link.choose = lambda transfers: draw.choice(list(transfers))
    requests = 0
    for step in range(150):
        layer = step % layers
        if draw.random() < 0.3:
            cache.prefetch([ExpertId(draw.randrange(layers), number) for number in draw.sample(range(experts), 2)])
            cache.check_integrity()
        for expert in list(link.in_flight):
            if draw.random() < 0.5:
                link.finish(expert)
        link.queued = {expert for expert in link.in_flight if draw.random() < 0.5}
        requested = draw.sample(range(experts), draw.randint(1, experts))
        use(cache, layer, *requested)
        requests += len(requested)
    assert cache.counters.hits + cache.counters.misses == requests
    link.finish(*link.in_flight)
    for expert in [ExpertId(layer, number) for layer in range(layers) for number in cache.residents(layer)]:
        assert holds(cache.region(0).memory[cache._held[expert].slot], expert, NBYTES)
    unrequested = sum(NBYTES for held in cache._held.values() if held.load_reason)
    assert cache.counters.bytes_loaded + unrequested == link.moved
