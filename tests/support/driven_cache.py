"""A cache over a fake link, and operations on it that check its contract."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from bench.support.policies.lru import GlobalLRU
from edgemoe.cache import EvictionPolicy, ExpertCache, ExpertId, Loan, SlotClass, SlotPool
from tests.support.cache_fakes import FakeLink, FakeStore, holds

NBYTES = 128
CPU = torch.device("cpu")


def make(slots: int, experts: Iterable[int] = (8, 8), policy: EvictionPolicy | None = None) -> ExpertCache:
    store = FakeStore(tuple(experts), NBYTES)
    return ExpertCache(store, FakeLink(store), SlotPool([SlotClass(NBYTES, slots)], CPU), policy or GlobalLRU())


def link_of(cache: ExpertCache) -> FakeLink:
    assert isinstance(cache._link, FakeLink)
    return cache._link


def free_slots(cache: ExpertCache) -> int:
    """The number of slots that hold no expert, loaded or loading."""
    experts = (ExpertId(layer, number) for layer, count in enumerate(cache.store.experts) for number in range(count))
    return cache.pool.count - sum(map(cache.holds, experts))


def use(cache: ExpertCache, layer: int, *experts: int) -> list[Loan]:
    """Exhausts a borrow, and checks for each loan that its slots hold their experts and may be read."""
    loans = []
    for loan in cache.borrow(layer, experts):
        for number, slot in zip(loan.experts, loan.slots, strict=True):
            assert holds(cache.region(layer).memory[slot], ExpertId(layer, number), NBYTES)
            assert ExpertId(layer, number) in link_of(cache).readable
        cache.check_integrity()
        loans.append(loan)
    assert sorted(number for loan in loans for number in loan.experts) == sorted(experts)
    cache.check_integrity()
    return loans


def ids(layer: int, *numbers: int) -> list[ExpertId]:
    return [ExpertId(layer, number) for number in numbers]


def prefetched(cache: ExpertCache, layer: int, *numbers: int) -> None:
    """Prefetches experts, which arrive immediately."""
    assert cache.prefetch(ids(layer, *numbers)) == len(numbers)
    link_of(cache).finish(*ids(layer, *numbers))
