from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from edgemoe.cache import Throttle


def test_bookings_follow_one_another_at_the_bandwidth() -> None:
    throttle = Throttle(1000)
    before = time.perf_counter()
    arrivals = [throttle.book(nbytes) for nbytes in (500, 250, 1000)]
    assert 0.5 <= arrivals[0] - before < 0.55
    assert arrivals[1] - arrivals[0] == pytest.approx(0.25)
    assert arrivals[2] - arrivals[1] == pytest.approx(1.0)


def test_an_idle_link_saves_nothing_up() -> None:
    throttle = Throttle(1_000_000)
    throttle.book(1)
    time.sleep(0.05)
    before = time.perf_counter()
    assert throttle.book(100_000) >= before + 0.1


def test_bookings_of_many_threads_add_up() -> None:
    throttle = Throttle(1000)
    before = time.perf_counter()
    with ThreadPoolExecutor(8) as pool:
        arrivals = sorted(pool.map(throttle.book, [10_000] * 40))
    steps = [later - earlier for earlier, later in zip(arrivals, arrivals[1:], strict=False)]
    assert steps == pytest.approx([10] * 39)
    assert arrivals[-1] - before >= 400


def test_sleeping_ends_at_the_arrival_and_not_before() -> None:
    arrival = time.perf_counter() + 0.05
    Throttle.sleep_until(arrival)
    assert time.perf_counter() >= arrival


def test_a_past_arrival_is_no_sleep() -> None:
    before = time.perf_counter()
    Throttle.sleep_until(before - 1)
    assert time.perf_counter() - before < 1


@pytest.mark.parametrize("bandwidth", [0, -1.0])
def test_a_bandwidth_must_be_positive(bandwidth: float) -> None:
    with pytest.raises(ValueError, match="must be above 0"):
        Throttle(bandwidth)
