"""The CUDA link's totals, on a device whose copies take a known time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from edgemoe.cache import ExpertCache, ExpertId, SlotClass, SlotPool, Throttle, Transfer
from edgemoe.cache.cuda_link import CudaLink, CudaStreams
from edgemoe.cache.eviction.hot_temporal import HotTemporal
from edgemoe.cache.link import Priority
from tests.support.cache_fakes import FakeStore, FakeStreams, LockedStore
from tests.support.waiting import wait_until

NBYTES = 1024
COPY = 0.02
"""Seconds per copy."""
HOLD = 0.05
"""Seconds for which no copy starts."""


@pytest.fixture
def slow() -> Iterator[FakeStreams]:
    made = FakeStreams(lambda: COPY)
    yield made
    made.end()


def link_of(streams: FakeStreams, throttle: Throttle | None = None) -> CudaLink:
    """A link over page-locked records."""
    return CudaLink(LockedStore(FakeStore([8], NBYTES)), streams, 1, 1, throttle)


def start(link: CudaLink, *numbers: int, priority: Priority = Priority.DEMAND) -> list[Transfer]:
    """Loads each expert into the slot of its number."""
    return [
        link.start(ExpertId(0, number), number, torch.zeros(NBYTES, dtype=torch.uint8), priority) for number in numbers
    ]


def arrive(link: CudaLink, transfers: list[Transfer]) -> None:
    """Waits for the copies, and lets the link count them."""
    wait_until(lambda: all(transfer.arrived() for transfer in transfers))
    link.released([])


def test_copies_that_wait_for_one_another_are_busy_one_after_the_other(slow: FakeStreams) -> None:
    link = link_of(slow)
    began = time.perf_counter()
    arrive(link, start(link, 0, 1, 2, 3))
    took = time.perf_counter() - began
    assert link.bytes_moved == 4 * NBYTES
    assert 4 * COPY <= link.busy_seconds <= took
    link.close()


def test_a_copy_that_waits_for_compute_is_not_on_its_way(slow: FakeStreams) -> None:
    link = link_of(slow)
    slow.compute.hold()
    link.released([0])
    began = time.perf_counter()
    transfers = start(link, 0)
    time.sleep(0.2)
    slow.compute.go()
    arrive(link, transfers)
    assert link.bytes_moved == NBYTES
    # Some of the 0.2 seconds may pass before the copy is made to wait.
    assert COPY <= link.busy_seconds <= time.perf_counter() - began - 0.1
    link.close()


@pytest.mark.parametrize(
    "occasion",
    [
        lambda link, transfers: start(link, 1),
        lambda link, transfers: link.wait_any(transfers),
        lambda link, transfers: link.released([]),
    ],
    ids=["start", "wait", "released"],
)
def test_a_copy_counts_at_the_first_occasion_after_it_has_passed(
    slow: FakeStreams, occasion: Callable[[CudaLink, list[Transfer]], object]
) -> None:
    """No occasion waits for the copy."""
    link = link_of(slow)
    slow.copies.hold()
    transfers = start(link, 0)
    link.wait_any(transfers)
    link.released([2])
    start(link, 7)
    assert (link.bytes_moved, link.busy_seconds) == (0, 0.0)
    slow.copies.go()
    wait_until(transfers[0].arrived)
    assert link.bytes_moved == 0
    occasion(link, transfers)
    assert link.bytes_moved >= NBYTES
    assert link.busy_seconds >= COPY
    link.close()


def test_a_prefetch_counts_without_an_occasion(slow: FakeStreams) -> None:
    link = link_of(slow)
    start(link, 0, 1, priority=Priority.PREFETCH)
    wait_until(lambda: link.bytes_moved == 2 * NBYTES)
    assert link.busy_seconds >= 2 * COPY
    link.close()


@pytest.mark.parametrize("copies", [[COPY] * 6, [2.5 * COPY, 0, 0, 0, 0, 0]], ids=["all", "one over two records"])
def test_a_simulated_link_is_busy_at_its_pace_and_copies_meanwhile_are_no_more(
    slow: FakeStreams, copies: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slow, "_copy_seconds", iter(copies).__next__)
    link = link_of(slow, Throttle(NBYTES / (2 * COPY)))
    began = time.perf_counter()
    arrive(link, start(link, *range(6)))
    took = time.perf_counter() - began
    assert link.bytes_moved == 6 * NBYTES
    assert 6 * 2 * COPY <= link.busy_seconds <= took
    link.close()


def test_a_copy_while_another_record_is_fetched_is_busy_once(
    slow: FakeStreams, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LockedStore(FakeStore([8], NBYTES), [ExpertId(0, 0)])
    monkeypatch.setattr(store, "pieces", lambda expert, slot: [(NBYTES, lambda: time.sleep(10 * COPY))])
    link = CudaLink(store, slow, 1, 1)
    began = time.perf_counter()
    arrive(link, start(link, 4, 5, 6, 7))
    arrive(link, start(link, 0, 1, 2, 3))
    took = time.perf_counter() - began
    assert link.bytes_moved == 8 * NBYTES
    assert 4 * COPY + 10 * COPY <= link.busy_seconds <= took
    link.close()


def test_the_devices_wait_for_a_copy_counts_though_the_host_does_not_wait(slow: FakeStreams) -> None:
    store = LockedStore(FakeStore([8], NBYTES))
    link = CudaLink(store, slow, 0, 1)
    with SlotPool([SlotClass(NBYTES, 2)], torch.device("cpu")) as pool:
        cache = ExpertCache(store, link, pool, HotTemporal([8]))
        slow.copies.hold()
        for _ in cache.borrow(0, [0]):
            pass
        host = cache.counters.link_wait_seconds
        time.sleep(HOLD)
        slow.copies.go()
        slow.block(slow.mark())
        for _ in cache.borrow(0, [0]):
            pass
        assert cache.counters.link_wait_seconds - host >= HOLD
        link.close()


def test_for_a_copy_that_has_passed_the_device_does_not_wait(slow: FakeStreams) -> None:
    link = link_of(slow)
    transfers = start(link, 0)
    arrive(link, transfers)
    link.wait_any(transfers)
    link.close()
    assert link.device_wait_seconds == 0


def test_closing_counts_what_is_left(slow: FakeStreams) -> None:
    link = link_of(slow)
    slow.copies.hold()
    start(link, 0, 1, 2)
    threading.Timer(0.05, slow.copies.go).start()
    link.close()
    assert link.bytes_moved == 3 * NBYTES
    assert link.busy_seconds >= 3 * COPY


def test_every_byte_counts_once_whichever_thread_copies_it(streams: FakeStreams) -> None:
    link = link_of(streams)
    began = time.perf_counter()
    transfers = []
    for _ in range(100):
        transfers += start(link, 0, 1, priority=Priority.PREFETCH) + start(link, 2, 3, 4)
    arrive(link, transfers)
    link.close()
    assert link.bytes_moved == len(transfers) * NBYTES
    assert 0 < link.busy_seconds <= time.perf_counter() - began


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_the_events_of_a_device_tell_how_long_its_copies_took() -> None:
    nbytes = 16 << 20
    link = CudaLink(LockedStore(FakeStore([8], nbytes)), CudaStreams(torch.device("cuda")), 1, 1)
    slots = torch.zeros(8, nbytes, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    began = time.perf_counter()
    for number in range(8):
        link.start(ExpertId(0, number), number, slots[number], Priority.DEMAND)
    link.close()
    took = time.perf_counter() - began
    assert link.bytes_moved == 8 * nbytes
    assert 0.1 * took <= link.busy_seconds <= took
