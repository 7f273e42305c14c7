"""Slots of experts that are read without a loan, while all are resident."""

from __future__ import annotations

from edgemoe.cache import ExpertCache, ExpertId
from tests.support.cache_fakes import holds
from tests.support.driven_cache import NBYTES, ids, link_of, make, prefetched, use

EXPERTS = 8


def filled(layers: int = 2) -> ExpertCache:
    """A cache into which every expert is being loaded, and has arrived in all layers but the last."""
    cache = make(EXPERTS * layers, [EXPERTS] * layers)
    for layer in range(layers):
        cache.fill(ids(layer, *range(EXPERTS)))
    for layer in range(layers - 1):
        link_of(cache).finish(*ids(layer, *range(EXPERTS)))
    return cache


def test_slots_are_told_once_the_layer_has_arrived() -> None:
    cache = filled()
    slots = cache.slots_of(0)
    assert slots is not None
    for number, slot in enumerate(slots.tolist()):
        assert holds(cache.region(0).memory[slot], ExpertId(0, number), NBYTES)
        assert ExpertId(0, number) in link_of(cache).readable
    assert cache.slots_of(0) is slots
    assert cache.slots_of(1) is None
    link_of(cache).finish(*ids(1, *range(EXPERTS)))
    assert cache.slots_of(1) is not None


def test_where_an_expert_is_missing_none_is_told() -> None:
    cache = make(2 * EXPERTS - 1)
    use(cache, 0, *range(EXPERTS))
    prefetched(cache, 1, *range(EXPERTS - 1))
    assert cache.slots_of(0) is None


def test_requests_of_such_experts_are_counted_and_recorded_as_borrowed_ones_are() -> None:
    hit, borrowed = filled(1), filled(1)
    for cache in (hit, borrowed):
        link_of(cache).finish(*ids(0, *range(EXPERTS)))
        cache.recording = []
    assert hit.slots_of(0) is not None
    for numbers in ([3, 1], [1, 7, 2]):
        hit.hit(0, numbers)
        use(borrowed, 0, *numbers)
    assert hit.counters == borrowed.counters
    assert hit.counters.bytes_filled == 4 * NBYTES
    assert hit.recording == borrowed.recording
