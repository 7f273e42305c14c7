"""Loans to drafts, which change no state, and queries of residency."""

from __future__ import annotations

import random

import pytest

from bench.support.policies.lru import BalancedLRU
from edgemoe.cache import ExpertCache, ExpertId, Loan
from tests.support.cache_fakes import holds
from tests.support.driven_cache import NBYTES, free_slots, ids, link_of, make, prefetched, use


def lend(cache: ExpertCache, layer: int, *experts: int) -> Loan:
    """A finished loan whose records were complete and readable."""
    with cache.lend(layer, experts) as loan:
        assert loan.experts == experts
        for number, slot in zip(loan.experts, loan.slots, strict=True):
            assert holds(cache.region(layer).memory[slot], ExpertId(layer, number), NBYTES)
            assert ExpertId(layer, number) in link_of(cache).readable
        cache.check_integrity()
    cache.check_integrity()
    return loan


# --- lend ------------------------------------------------------------------------------------------


def test_what_is_resident_is_lent_in_the_asked_order() -> None:
    cache = make(6)
    use(cache, 0, 1, 2, 5)
    lend(cache, 0, 5, 1)
    lend(cache, 0)


def test_what_arrived_unasked_is_made_readable() -> None:
    cache = make(4)
    use(cache, 0, 1)
    prefetched(cache, 0, 3, 4)
    lend(cache, 0, 4, 1, 3)


def test_a_loan_for_a_draft_counts_nothing() -> None:
    cache = make(4)
    use(cache, 0, 1)
    prefetched(cache, 0, 3)
    before = cache.counters.copy()
    lend(cache, 0, 3, 1)
    assert cache.counters == before
    use(cache, 0, 3)
    assert cache.counters.bytes_prefetched_used == NBYTES, "the requesting pass uses it"


def test_a_loan_for_a_draft_is_not_remembered_as_use() -> None:
    cache = make(2)
    use(cache, 0, 0)
    use(cache, 0, 1)
    lend(cache, 0, 0)
    use(cache, 1, 5)
    assert cache.residents(0) == [1]


def test_what_is_lent_to_a_draft_stays_in_its_slot() -> None:
    cache = make(3)
    use(cache, 0, 0, 1)
    with cache.lend(0, [0, 1]) as loan:
        use(cache, 1, 3, 4, 5)
        assert cache.prefetch(ids(1, 6, 7)) == 1
        assert sorted(cache.residents(0)) == [0, 1]
        for number, slot in zip(loan.experts, loan.slots, strict=True):
            assert holds(cache.region(0).memory[slot], ExpertId(0, number), NBYTES)
    link_of(cache).finish(*link_of(cache).in_flight)
    use(cache, 1, 0, 1, 2)
    assert cache.residents(0) == []


def test_a_loan_within_a_loan_ends_alone() -> None:
    cache = make(2)
    use(cache, 0, 0, 1)
    with cache.lend(0, [0, 1]):
        lend(cache, 0, 1)
        assert cache.prefetch(ids(1, 0)) == 0
        cache.check_integrity()
    assert cache.prefetch(ids(1, 0)) == 1


def test_an_error_in_the_block_ends_the_loan() -> None:
    cache = make(2)
    use(cache, 0, 0, 1)
    with pytest.raises(ZeroDivisionError), cache.lend(0, [0, 1]):
        raise ZeroDivisionError
    use(cache, 1, 0, 1)
    assert cache.residents(0) == []


def test_the_link_is_told_when_a_draft_has_read_for_the_last_time() -> None:
    cache = make(2)
    use(cache, 0, 0, 1)
    link_of(cache).events.clear()
    with cache.lend(0, [1, 0]) as loan:
        assert link_of(cache).events == []
    assert link_of(cache).events == [("released", loan.slots)]


@pytest.mark.parametrize("missing", ["unknown", "on the link", "failed"])
def test_what_is_not_resident_is_not_lent_and_nothing_stays_pinned(missing: str) -> None:
    cache = make(3)
    use(cache, 0, 0)
    link = link_of(cache)
    if missing != "unknown":
        cache.prefetch(ids(0, 7))
    if missing == "failed":
        link.faults[ExpertId(0, 7)] = OSError("disk gone")
        link.finish(ExpertId(0, 7))
    link.choose = None
    with pytest.raises(KeyError), cache.lend(0, [0, 7]):
        raise AssertionError("it was lent")
    cache.check_integrity()
    link.choose = lambda transfers: transfers[0]
    link.finish(*link.in_flight)
    use(cache, 1, 0, 1, 2)
    assert cache.residents(0) == []


# --- residency -------------------------------------------------------------------------------------


def test_a_cache_is_complete_when_every_expert_of_every_layer_has_a_slot() -> None:
    cache = make(6, experts=(3, 1, 2))
    use(cache, 0, 0, 1, 2)
    use(cache, 2, 0, 1)
    assert not cache.complete
    cache.prefetch(ids(1, 0))
    assert cache.complete, "in flight or resident"
    link_of(cache).queued = set(ids(1, 0))
    cache.cancel_prefetches(ids(1, 0))
    assert not cache.complete


def test_with_fewer_slots_than_experts_it_never_is() -> None:
    cache = make(5, experts=(3, 3))
    use(cache, 0, 0, 1, 2)
    use(cache, 1, 0, 1, 2)
    assert free_slots(cache) == 0
    assert not cache.complete


def test_an_expert_is_held_from_its_load_until_it_leaves() -> None:
    cache = make(1)
    expert = ExpertId(0, 3)
    assert not cache.holds(expert)
    cache.prefetch([expert])
    assert cache.holds(expert)
    assert not cache.is_resident(expert)
    link_of(cache).finish(expert)
    assert cache.holds(expert)
    use(cache, 1, 0)
    assert not cache.holds(expert)


@pytest.mark.parametrize("seed", range(8))
def test_what_the_cache_tells_is_what_a_plain_search_finds(seed: int) -> None:
    """Under random loads, loans, failures and cancelled prefetches, in layers of different sizes."""
    draw = random.Random(seed)
    experts = (5, 9, 2, 7)
    everyone = [ExpertId(layer, number) for layer, count in enumerate(experts) for number in range(count)]
    slots = draw.choice([2, 6, 12, len(everyone)])
    cache = make(slots, experts, BalancedLRU(len(experts), slots))
    link = link_of(cache)
    link.choose = lambda transfers: draw.choice(list(transfers))

    def check() -> None:
        cache.check_integrity()
        for layer, count in enumerate(experts):
            resident = [number for number in range(count) if cache.is_resident(ExpertId(layer, number))]
            assert sorted(cache.residents(layer)) == resident
        assert cache.complete == all(map(cache.holds, everyone))
        unrequested = [held for held in cache._held.values() if held.load_reason and held.transfer is not None]
        assert cache.prefetching == sum(held.transfer is not None and not held.transfer.done for held in unrequested)

    for _ in range(150):
        layer = draw.randrange(len(experts))
        requested = draw.sample(range(experts[layer]), draw.randint(1, experts[layer]))
        link.queued = {expert for expert in link.in_flight if draw.random() < 0.5}
        what = draw.randrange(6)
        if what == 0:
            cache.prefetch(draw.sample(everyone, 3), draw.sample(everyone, 2))
        elif what == 1:
            cache.cancel_prefetches(draw.sample(everyone, 6))
        elif what == 2:
            lend(cache, layer, *cache.residents(layer))
        elif what == 3:
            use(cache, layer, *requested)
        elif what == 4:
            borrowed = cache.borrow(layer, requested)
            next(borrowed)
            check()
            borrowed.close()
        else:
            for expert in [expert for expert in link.in_flight if draw.random() < 0.5]:
                if cache._held[expert].load_reason and draw.random() < 0.2:
                    link.faults[expert] = OSError("disk gone")
                link.finish(expert)
        check()


# --- touch -----------------------------------------------------------------------------------------


def test_what_a_draft_would_have_requested_is_told_to_the_policy_and_not_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache, told = make(2), list[tuple[int, list[int]]]()
    use(cache, 0, 0)
    use(cache, 0, 1)
    monkeypatch.setattr(cache._policy, "requested", lambda layer, experts: told.append((layer, list(experts))))
    before, events = cache.counters.copy(), len(link_of(cache).events)
    cache.touch(0, [0, 7])
    assert told == [(0, [0, 7])]
    assert cache.counters == before
    assert len(link_of(cache).events) == events
    assert not cache.holds(ExpertId(0, 7))


def test_what_was_loaded_for_drafts_is_used_by_them() -> None:
    cache = make(4)
    prefetched(cache, 0, 3, 4)
    cache.touch(0, [3, 5])
    assert cache.counters.bytes_prefetched_used == NBYTES
    assert (cache.counters.hits, cache.counters.misses) == (0, 0)
