"""A cache over layers with records of two sizes: each layer uses the slots of its own size only."""

from __future__ import annotations

import random

import pytest
import torch

from bench.support.policies.lru import GlobalLRU
from edgemoe.cache import ExpertCache, ExpertId, Loan, SlotClass, SlotPool
from edgemoe.cache.eviction.hot_temporal import HotTemporal
from edgemoe.cache.eviction.policy import EvictionPolicy
from tests.support.cache_fakes import FakeLink, FakeStore, holds
from tests.support.driven_cache import ids, link_of

SMALL, LARGE = 128, 192
SIZES = (SMALL, LARGE, SMALL, LARGE)
EXPERTS = (8,) * len(SIZES)


def make(small: int, large: int, policy: EvictionPolicy | None = None) -> ExpertCache:
    """Layers 0 and 2 use `small` slots, layers 1 and 3 `large` ones."""
    store = FakeStore(EXPERTS, SIZES)
    pool = SlotPool([SlotClass(SMALL, small), SlotClass(LARGE, large)], torch.device("cpu"))
    return ExpertCache(store, FakeLink(store), pool, policy or GlobalLRU())


def use(cache: ExpertCache, layer: int, *experts: int) -> list[Loan]:
    """Exhausts a borrow, and checks for each loan that the slots of its size hold its experts."""
    loans = []
    for loan in cache.borrow(layer, experts):
        region = cache.region(layer)
        assert region.slot_nbytes == SIZES[layer]
        for number, slot in zip(loan.experts, loan.slots, strict=True):
            assert holds(region.memory[slot], ExpertId(layer, number), SIZES[layer])
            assert ExpertId(layer, number) in link_of(cache).readable
        cache.check_integrity()
        loans.append(loan)
    assert sorted(number for loan in loans for number in loan.experts) == sorted(experts)
    return loans


def test_a_cache_needs_a_slot_of_each_size() -> None:
    for counts in ((0, 3), (3, 0)):
        with pytest.raises(ValueError, match="at least 1 slot"):
            make(*counts)


def test_the_link_knows_slots_of_all_sizes_by_different_numbers() -> None:
    cache = make(2, 2)
    use(cache, 0, 0, 1)
    [first, second] = [loan.slots for loan in use(cache, 1, 0, 1)]
    assert sorted(first + second) == [0, 1], "within the layer's region"
    released = [slot for slots in link_of(cache).happened("released") for slot in slots]
    assert sorted(released) == [0, 1, 2, 3]


def test_a_full_cache_evicts_within_the_size() -> None:
    cache = make(2, 2)
    use(cache, 0, 0, 1)
    use(cache, 1, 0, 1)
    use(cache, 3, 5)
    assert sorted(cache.residents(0)) == [0, 1], "used the longest ago, and of another size"
    assert cache.residents(1) == [1]
    use(cache, 2, 7)
    assert (cache.residents(0), cache.residents(2), cache.residents(3)) == ([1], [7], [5])


def test_free_slots_of_another_size_are_not_taken() -> None:
    cache = make(1, 5)
    use(cache, 0, 0)
    use(cache, 2, 0)
    assert (cache.residents(0), cache.residents(2)) == ([], [0])
    assert cache.prefetch(ids(0, 3), needed_sooner=ids(2, 0)) == 0
    assert cache.prefetch(ids(1, 3), needed_sooner=ids(2, 0)) == 1


@pytest.mark.parametrize("layer", [0, 1])
def test_more_experts_than_slots_of_the_size_stream_through_them(layer: int) -> None:
    cache = make(2, 2)
    use(cache, 1 - layer, 0, 1)
    loans = use(cache, layer, *range(8))
    assert max(len(loan.slots) for loan in loans) <= 2
    assert sorted(cache.residents(1 - layer)) == [0, 1]


def test_a_large_request_keeps_a_layers_share_of_the_slots_of_its_size() -> None:
    cache = make(16, 10)
    use(cache, 0, *range(8))
    use(cache, 2, *range(8))
    use(cache, 1, *range(8))
    use(cache, 3, 0, 1, 2, 3, 4)
    use(cache, 3, *range(8))
    assert {6, 7} <= set(cache.residents(3)), "10 slots for 2 layers, of which 3 are for transit"
    assert (len(cache.residents(0)), len(cache.residents(2))) == (8, 8)


def test_a_demand_cancels_a_prefetch_of_its_size_only() -> None:
    cache = make(1, 1)
    link = link_of(cache)
    assert cache.prefetch([*ids(0, 0), *ids(1, 0)]) == 2
    link.queued = {*ids(0, 0), *ids(1, 0)}
    use(cache, 2, 5)
    assert link.happened("cancel") == ids(0, 0), "that of layer 1 is the latest"
    assert list(link.in_flight) == ids(1, 0)


def test_a_demand_waits_for_a_prefetch_of_its_size_only() -> None:
    cache = make(1, 1)
    link = link_of(cache)
    cache.prefetch([*ids(1, 0), *ids(0, 0)])
    use(cache, 2, 5)
    assert link.happened("wait") == [tuple(ids(0, 0)), tuple(ids(2, 5))]
    assert list(link.in_flight) == ids(1, 0)


def test_a_late_prefetch_is_promoted_in_its_slot() -> None:
    cache = make(2, 2)
    cache.prefetch([*ids(1, 3), *ids(0, 4)])
    use(cache, 1, 3, 2)
    assert link_of(cache).happened("promote") == ids(1, 3)
    assert link_of(cache).happened("start") == ids(1, 2)
    assert list(link_of(cache).in_flight) == ids(0, 4)


def test_filling_skips_experts_without_a_free_slot_of_their_size() -> None:
    cache = make(1, 3)
    cache.fill([*ids(0, 0, 1), *ids(1, 0, 1), *ids(2, 0), *ids(3, 0)])
    assert link_of(cache).happened("prefetch") == [*ids(0, 0), *ids(1, 0, 1), *ids(3, 0)]


@pytest.mark.parametrize("default_policy", [False, True])
@pytest.mark.parametrize("slots", [(1, 1), (2, 7), (9, 3), (16, 16)])
@pytest.mark.parametrize("seed", range(5))
def test_random_work_never_puts_a_record_into_a_slot_of_another_size(
    seed: int, slots: tuple[int, int], default_policy: bool
) -> None:
    draw = random.Random(seed)
    cache = make(*slots, HotTemporal(EXPERTS) if default_policy else None)
    link = link_of(cache)
    link.choose = lambda transfers: draw.choice(list(transfers))
    for step in range(120):
        if draw.random() < 0.4:
            cache.prefetch([ExpertId(draw.randrange(4), number) for number in draw.sample(range(8), 2)])
            cache.check_integrity()
        for expert in list(link.in_flight):
            if draw.random() < 0.5:
                link.finish(expert)
        link.queued = {expert for expert in link.in_flight if draw.random() < 0.5}
        use(cache, step % 4, *draw.sample(range(8), draw.randint(1, 8)))
    link.finish(*link.in_flight)
    for layer, nbytes in enumerate(SIZES):
        region = cache.region(layer)
        for number in cache.residents(layer):
            slot = cache._held[ExpertId(layer, number)].slot - region.first
            assert holds(region.memory[slot], ExpertId(layer, number), nbytes)
