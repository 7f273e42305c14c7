"""Each byte that crosses the link is counted exactly once."""

from __future__ import annotations

import dataclasses

import pytest

from edgemoe.cache import CacheCounters, ExpertCache, ExpertId
from tests.support.driven_cache import NBYTES, ids, link_of, make, prefetched, use


def bytes_of(cache: ExpertCache) -> dict[str, int]:
    """The byte counters that are not 0, in records."""
    counted = {key: value for key, value in dataclasses.asdict(cache.counters).items() if key.startswith("bytes_")}
    assert all(value % NBYTES == 0 for value in counted.values())
    return {key.removeprefix("bytes_"): value // NBYTES for key, value in counted.items() if value}


def test_demands_and_hits() -> None:
    cache = make(4)
    use(cache, 0, 0, 1, 2)
    assert bytes_of(cache) == {"demanded": 3}
    use(cache, 0, 1, 2, 3)
    assert bytes_of(cache) == {"demanded": 4, "hit": 2}
    assert (cache.counters.hits, cache.counters.misses) == (2, 4)
    assert cache.counters.hit_rate == pytest.approx(1 / 3)
    assert cache.counters.bytes_loaded == 4 * NBYTES == link_of(cache).moved


def test_a_prefetch_in_time_counts_as_used_once() -> None:
    cache = make(4)
    prefetched(cache, 0, 0, 1)
    assert bytes_of(cache) == {}
    use(cache, 0, 0)
    use(cache, 0, 0)
    assert bytes_of(cache) == {"prefetched_used": 1, "hit": 2}


def test_a_prefetch_still_on_the_link_counts_as_late_and_as_a_miss() -> None:
    cache = make(4)
    cache.prefetch(ids(0, 0))
    use(cache, 0, 0)
    assert bytes_of(cache) == {"prefetched_late": 1}
    assert (cache.counters.hits, cache.counters.misses) == (0, 1)
    use(cache, 0, 0)
    assert bytes_of(cache) == {"prefetched_late": 1, "hit": 1}


def test_a_prefetch_evicted_unasked_counts_as_wasted() -> None:
    cache = make(1)
    prefetched(cache, 0, 0)
    use(cache, 0, 1)
    assert bytes_of(cache) == {"prefetched_wasted": 1, "demanded": 1}
    assert cache.counters.bytes_loaded == link_of(cache).moved


def test_a_used_prefetch_that_leaves_is_not_wasted() -> None:
    cache = make(1)
    prefetched(cache, 0, 0)
    use(cache, 0, 0)
    use(cache, 0, 1)
    assert bytes_of(cache) == {"prefetched_used": 1, "hit": 1, "demanded": 1}


def test_a_load_asked_for_twice_while_it_travels_counts_once() -> None:
    cache = make(4)
    borrowed = cache.borrow(0, [0, 1])
    next(borrowed)
    borrowed.close()
    use(cache, 0, 1)
    assert link_of(cache).moved == 2 * NBYTES
    assert cache.counters.bytes_loaded == 2 * NBYTES


def test_a_failed_prefetch_that_is_demanded_counts_as_demanded() -> None:
    cache = make(2)
    link = link_of(cache)
    cache.prefetch(ids(0, 3))
    link.faults[ExpertId(0, 3)] = OSError("disk gone")
    link.finish(ExpertId(0, 3))
    use(cache, 0, 3)
    assert bytes_of(cache) == {"demanded": 1}


def test_records_of_different_layers_count_with_their_own_size() -> None:
    cache = make(4, (2, 2))
    use(cache, 0, 0)
    use(cache, 1, 1)
    assert cache.counters.bytes_demanded == sum(cache.store.record_nbytes(ExpertId(layer, 0)) for layer in (0, 1))


def test_waiting_for_the_link_is_timed_and_hits_are_not() -> None:
    cache = make(2)
    use(cache, 0, 0)
    waited = cache.counters.link_wait_seconds
    assert waited > 0
    use(cache, 0, 0)
    assert cache.counters.link_wait_seconds == waited


def test_a_copy_is_a_snapshot() -> None:
    counters = CacheCounters(hits=1)
    before = counters.copy()
    counters.hits += 4
    assert (before.hits, counters.hits) == (1, 5)


def test_the_hit_rate_of_nothing_is_zero() -> None:
    assert CacheCounters().hit_rate == 0
