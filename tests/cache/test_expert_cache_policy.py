"""The cache's calls of its policy, its recorded trace, and its work with the default policy."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from bench.support.policies.lru import GlobalLRU
from bench.support.policies.trace import replay
from edgemoe.cache import EvictionPolicy, ExpertCache, ExpertId, SlotClass, SlotPool
from edgemoe.cache.eviction.hot_temporal import HotTemporal
from tests.support.cache_fakes import FakeLink, FakeStore, holds

NBYTES = 128


class Listener(GlobalLRU):
    """Logs its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, Any]] = []

    def requested(self, layer: int, experts: Sequence[int]) -> None:
        self.calls.append(("requested", (layer, tuple(experts))))

    def inserted(self, expert: ExpertId) -> None:
        self.calls.append(("inserted", expert))
        super().inserted(expert)

    def used(self, expert: ExpertId) -> None:
        self.calls.append(("used", expert))
        super().used(expert)


def make(slots: int, policy: EvictionPolicy, experts: Sequence[int] = (8, 8)) -> ExpertCache:
    store = FakeStore(tuple(experts), NBYTES)
    return ExpertCache(store, FakeLink(store), SlotPool([SlotClass(NBYTES, slots)], torch.device("cpu")), policy)


def use(cache: ExpertCache, layer: int, *experts: int) -> None:
    for loan in cache.borrow(layer, experts):
        for number, slot in zip(loan.experts, loan.slots, strict=True):
            assert holds(cache.region(layer).memory[slot], ExpertId(layer, number), NBYTES)
        cache.check_integrity()


def test_a_pass_is_told_once_and_first() -> None:
    policy = Listener()
    cache = make(4, policy)
    use(cache, 0, 3, 1)
    use(cache, 0, 1, 2)
    assert [what for what, _ in policy.calls].count("requested") == 2
    assert policy.calls[0] == ("requested", (0, (3, 1)))
    second = policy.calls.index(("requested", (0, (1, 2))))
    assert policy.calls[second + 1] == ("used", (0, 1))
    assert ("inserted", (0, 2)) in policy.calls[second:]


def test_prefetches_and_drafts_are_no_wishes() -> None:
    policy = Listener()
    cache = make(4, policy)
    cache.recording = []
    cache.prefetch([ExpertId(1, 5)])
    link = cache._link
    assert isinstance(link, FakeLink)
    link.finish(ExpertId(1, 5))
    with cache.lend(1, [5]):
        pass
    assert policy.calls == [("inserted", (1, 5))]
    assert cache.recording == []


def test_what_is_asked_for_is_recorded_while_there_is_a_list() -> None:
    cache = make(3, GlobalLRU())
    use(cache, 0, 1)
    trace: list[list[ExpertId]] = []
    cache.recording = trace
    use(cache, 0, 4, 2)
    use(cache, 1, *range(8))
    cache.recording = None
    use(cache, 0, 1)
    assert trace == [[(0, 4), (0, 2)], [(1, number) for number in range(8)]]


@pytest.mark.parametrize("slots", [1, 2, 5, 9, 24])
@pytest.mark.parametrize("seed", range(3))
def test_the_default_policy_serves_any_passes_through_any_number_of_slots(slots: int, seed: int) -> None:
    draw = random.Random(seed)
    cache = make(slots, HotTemporal([8, 6, 10]), (8, 6, 10))
    for time in range(150):
        layer, count = time % 3, cache.store.experts[time % 3]
        if draw.random() < 0.3:
            ahead = (layer + 1) % 3
            cache.prefetch([ExpertId(ahead, number) for number in draw.sample(range(6), 2)])
        use(cache, layer, *draw.sample(range(count), draw.choice([1, 2, 2, count])))


def test_a_recorded_trace_has_as_many_misses_in_the_replay() -> None:
    """All requests fit, so that the cache's rules for larger ones do not matter."""
    draw = random.Random(7)
    cache = make(12, HotTemporal([8, 8]))
    cache.recording = []
    for _ in range(200):
        for layer in range(2):
            use(cache, layer, *draw.choices([(0, 1), (2, 5), (3, 4), (1, 7), (6, 2)], [8, 4, 2, 1, 1])[0])
    assert replay(cache.recording, HotTemporal([8, 8]), 12) == cache.counters.misses
