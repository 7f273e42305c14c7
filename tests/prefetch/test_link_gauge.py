"""A gauge's readings, with a clock that tests advance and over a real link."""

from __future__ import annotations

import time

import pytest
import torch

from edgemoe.cache import CacheCounters, ExpertId, Throttle, Transfer
from edgemoe.cache.link import Priority
from edgemoe.cache.reader_link import ReaderLink
from edgemoe.prefetch import link_gauge
from edgemoe.prefetch.link_gauge import MIN_INTERVAL, NEWEST_WEIGHT, LinkGauge
from tests.support.cache_fakes import FakeLink, FakeStore
from tests.support.instruments import Clock


@pytest.fixture
def link() -> FakeLink:
    return FakeLink(FakeStore([4]))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(link_gauge, monkeypatch)


def passes(clock: Clock, link: FakeLink, seconds: float, busy: float, nbytes: int) -> None:
    clock.now += seconds
    link.busy_seconds += busy
    link.bytes_moved += nbytes


def test_it_knows_nothing_at_first(link: FakeLink, clock: Clock) -> None:
    gauge = LinkGauge(link)
    assert (gauge.bandwidth, gauge.busy) == (0.0, 0.0)
    passes(clock, link, 10 * MIN_INTERVAL, 0.0, 0)
    gauge.read()
    assert (gauge.bandwidth, gauge.busy) == (0.0, 0.0), "a link without transfers has no bandwidth yet"


def test_the_first_speed_is_taken_as_it_is_and_later_ones_a_little(link: FakeLink, clock: Clock) -> None:
    gauge = LinkGauge(link)
    passes(clock, link, 1.0, 0.5, 4000)
    gauge.read()
    assert gauge.bandwidth == pytest.approx(8000)
    assert gauge.busy == pytest.approx(NEWEST_WEIGHT * 0.5)
    passes(clock, link, 2.0, 2.0, 4000)
    gauge.read()
    assert gauge.bandwidth == pytest.approx(8000 + NEWEST_WEIGHT * (2000 - 8000))
    assert gauge.busy == pytest.approx(NEWEST_WEIGHT * 0.5 + NEWEST_WEIGHT * (1 - NEWEST_WEIGHT * 0.5))


def test_what_was_there_before_it_is_not_counted(link: FakeLink, clock: Clock) -> None:
    passes(clock, link, 5.0, 5.0, 1_000_000)
    gauge = LinkGauge(link)
    passes(clock, link, 1.0, 0.25, 1000)
    gauge.read()
    assert (gauge.bandwidth, gauge.busy) == pytest.approx((4000, NEWEST_WEIGHT * 0.25))


def test_within_a_moment_nothing_is_read_and_nothing_is_lost(link: FakeLink, clock: Clock) -> None:
    gauge = LinkGauge(link)
    passes(clock, link, 0.6 * MIN_INTERVAL, 0.6 * MIN_INTERVAL, 600)
    gauge.read()
    assert (gauge.bandwidth, gauge.busy) == (0.0, 0.0)
    passes(clock, link, 0.6 * MIN_INTERVAL, 0.0, 0)
    gauge.read()
    assert gauge.bandwidth == pytest.approx(1000 / MIN_INTERVAL)
    assert gauge.busy == pytest.approx(NEWEST_WEIGHT * 0.5)


def test_a_link_at_rest_keeps_its_speed_and_is_less_and_less_busy(link: FakeLink, clock: Clock) -> None:
    gauge = LinkGauge(link)
    passes(clock, link, 1.0, 1.0, 5000)
    gauge.read()
    for _ in range(3):
        passes(clock, link, 1.0, 0.0, 0)
        gauge.read()
    assert gauge.bandwidth == pytest.approx(5000)
    assert gauge.busy == pytest.approx(NEWEST_WEIGHT * (1 - NEWEST_WEIGHT) ** 3)
    passes(clock, link, 1.0, 0.5, 0)
    gauge.read()
    assert gauge.bandwidth == pytest.approx(5000), "busy with transfers that have not arrived, or will not"


def test_it_is_never_more_busy_than_the_time_there_was(link: FakeLink, clock: Clock) -> None:
    gauge = LinkGauge(link)
    for _ in range(40):
        passes(clock, link, 1.0, 3.0, 100)
        gauge.read()
        assert gauge.busy <= 1
    assert gauge.busy == pytest.approx(1, abs=1e-4)


def test_how_much_a_pass_waits_is_a_share_of_the_time_in_which_the_link_is_busy(link: FakeLink, clock: Clock) -> None:
    counters = CacheCounters(link_wait_seconds=100.0)
    gauge = LinkGauge(link, counters)
    assert gauge.wait_share == 1.0, "before the first reading"
    passes(clock, link, 2.0, 1.0, 100)
    counters.link_wait_seconds += 0.25
    gauge.read()
    assert gauge.wait_share == pytest.approx(1 - NEWEST_WEIGHT * 0.75)
    known = gauge.wait_share
    passes(clock, link, 1.0, 0.0, 0)
    gauge.read()
    assert gauge.wait_share == known, "an idle link has no wait share"
    passes(clock, link, 1.0, 0.5, 100)
    counters.link_wait_seconds += 3.0
    gauge.read()
    assert gauge.wait_share == pytest.approx(known + NEWEST_WEIGHT * (1 - known)), "at most 1"
    known = gauge.wait_share
    passes(clock, link, 1.0, 0.5, 100)
    gauge.read()
    assert gauge.wait_share == pytest.approx(known * (1 - NEWEST_WEIGHT)), "earlier waits do not count again"


def test_without_a_cache_all_of_it_is_waited_for(link: FakeLink, clock: Clock) -> None:
    gauge = LinkGauge(link)
    passes(clock, link, 1.0, 1.0, 100)
    gauge.read()
    assert gauge.wait_share == 1.0


def test_a_link_that_never_rests_is_seen_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its queue is never empty at a reading."""
    monkeypatch.setattr(link_gauge, "MIN_INTERVAL", 0.015)
    store = FakeStore([20], 2000)
    link = ReaderLink(store, 2, Throttle(100_000))
    gauge = LinkGauge(link)
    memory = torch.zeros(store.slot_nbytes, dtype=torch.uint8)

    def more(numbers: range) -> list[Transfer]:
        return [link.start(ExpertId(0, number), 0, memory, Priority.PREFETCH) for number in numbers]

    waiting = more(range(20))
    end = time.perf_counter() + 2
    while time.perf_counter() < end:
        done = link.wait_any(waiting)
        waiting = [transfer for transfer in waiting if transfer not in done] + more(range(len(done)))
        gauge.read()
    link.close()
    assert gauge.busy > 0.8
    assert 40_000 < gauge.bandwidth < 120_000
