"""A link's totals: its busy time and the bytes it moved."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from edgemoe.cache import ExpertId, Link, Throttle
from edgemoe.cache.cuda_link import CudaLink
from edgemoe.cache.link import Priority
from edgemoe.cache.reader_link import ReaderLink
from tests.support.cache_fakes import FakeStore, FakeStreams
from tests.support.waiting import wait_until

NBYTES = 1024


@pytest.fixture(params=["reader", "cuda"])
def make(request: pytest.FixtureRequest, streams: FakeStreams) -> Callable[..., Link]:
    """A factory of links, from a store, a number of threads and a throttle."""

    def make(store: FakeStore, threads: int, throttle: Throttle | None = None) -> Link:
        if request.param == "reader":
            return ReaderLink(store, threads, throttle)
        return CudaLink(store, streams, 2, threads, throttle)

    return make


def load(link: Link, store: FakeStore, *numbers: int) -> None:
    """Loads experts one at a time, and waits for each."""
    for number in numbers:
        memory = torch.zeros(store.slot_nbytes, dtype=torch.uint8)
        link.wait_any([link.start(ExpertId(0, number), 0, memory, Priority.DEMAND)])


def begin(link: Link, store: FakeStore, *numbers: int) -> list[ExpertId]:
    experts = [ExpertId(0, number) for number in numbers]
    for expert in experts:
        link.start(expert, 0, torch.zeros(store.slot_nbytes, dtype=torch.uint8), Priority.PREFETCH)
    return experts


def test_both_grow_while_it_is_still_busy(make: Callable[..., Link]) -> None:
    """Readings in between must see both totals in step, or a link that is never idle would seem idle."""
    store = FakeStore([8], NBYTES)
    store.hold(*(ExpertId(0, number) for number in range(4)))
    link = make(store, 1)
    experts = begin(link, store, 0, 1, 2, 3)
    for done, expert in enumerate(experts[:3], start=1):
        wait_until(lambda: expert in store.started)  # noqa: B023
        before = link.busy_seconds
        time.sleep(0.01)
        store.let(expert)
        wait_until(lambda: link.bytes_moved == done * NBYTES)  # noqa: B023
        wait_until(lambda: link.busy_seconds >= before + 0.01)  # noqa: B023
    store.let(experts[3])
    link.close()


def test_time_in_which_nothing_is_on_its_way_is_not_busy(make: Callable[..., Link]) -> None:
    store = FakeStore([8], NBYTES)
    link = make(store, 2)
    load(link, store, 0, 1)
    busy, began = link.busy_seconds, time.perf_counter()
    time.sleep(0.2)
    load(link, store, 2)
    assert link.busy_seconds - busy <= time.perf_counter() - began - 0.1
    link.close()


def test_loads_at_the_same_time_are_busy_once(make: Callable[..., Link]) -> None:
    store = FakeStore([8], NBYTES)
    store.hold(*(ExpertId(0, number) for number in range(4)))
    link = make(store, 4)
    started = time.perf_counter()
    experts = begin(link, store, 0, 1, 2, 3)
    wait_until(lambda: len(store.started) > 0)
    time.sleep(0.02)
    store.let(*experts)
    wait_until(lambda: link.bytes_moved == 4 * NBYTES)
    assert 0.02 <= link.busy_seconds <= time.perf_counter() - started
    link.close()


def test_one_over_the_other_is_the_bandwidth(make: Callable[..., Link]) -> None:
    store = FakeStore([20], 10_000, pieces=2)
    link = make(store, 2, Throttle(1_000_000))
    began = time.perf_counter()
    load(link, store, *range(8))
    took = time.perf_counter() - began
    assert link.bytes_moved / 1_010_000 <= link.busy_seconds <= took
    link.close()


def test_what_failed_or_was_called_off_was_not_moved(make: Callable[..., Link]) -> None:
    store = FakeStore([8], NBYTES)
    link = make(store, 1)
    store.faults[ExpertId(0, 0)] = OSError("disk gone")
    load(link, store, 0, 1)
    store.hold(ExpertId(0, 2))
    running, queued = (
        link.start(ExpertId(0, number), 0, torch.zeros(store.slot_nbytes, dtype=torch.uint8), Priority.PREFETCH)
        for number in (2, 3)
    )
    wait_until(lambda: store.started[-1] == (0, 2))
    assert not link.cancel(running)
    assert link.cancel(queued)
    assert not link.cancel(queued), "it was cancelled before"
    store.let(ExpertId(0, 2))
    link.wait_any([running])
    wait_until(lambda: link.bytes_moved == 2 * NBYTES)
    busy, began = link.busy_seconds, time.perf_counter()
    time.sleep(0.2)
    load(link, store, 4)
    assert link.busy_seconds - busy <= time.perf_counter() - began - 0.1, "nothing was in flight in between"
    link.close()
