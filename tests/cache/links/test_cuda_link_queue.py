"""The queues of the CUDA link: what they cost, what a failure leaves behind, and whom the device waits for."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from edgemoe.cache import ExpertCache, ExpertId, SlotClass, SlotPool, Transfer, accelerator
from edgemoe.cache.cuda_link import CudaLink, CudaStreams
from edgemoe.cache.eviction.hot_temporal import HotTemporal
from edgemoe.cache.link import Priority
from edgemoe.cache.store import Piece
from tests.support.cache_fakes import FakeStore, FakeStreams, LockedStore
from tests.support.waiting import wait_until

NBYTES = 128
MANY = 8000
"""Experts that wait to be loaded, as while a large model is started."""


class EmptyStore(FakeStore):
    """Records that are never written: more of them than there are byte values."""

    def pieces(self, expert: ExpertId, slot: torch.Tensor) -> Sequence[Piece]:
        return []


def link_of(streams: FakeStreams, experts: int = 8) -> CudaLink:
    return CudaLink(LockedStore(EmptyStore([experts], NBYTES)), streams, 1, 1)


def queue(link: CudaLink, count: int) -> list[Transfer]:
    """Prefetches of so many experts, all into the same memory."""
    memory = torch.zeros(NBYTES, dtype=torch.uint8)
    return [link.start(ExpertId(0, number), 0, memory, Priority.PREFETCH) for number in range(count)]


@pytest.mark.parametrize("ask", ["cancel", "promote"])
def test_what_waits_is_found_without_a_look_at_all_that_waits(streams: FakeStreams, ask: str) -> None:
    """A scan of the queue takes about a millisecond, and a pass asks for each of its experts."""
    link = link_of(streams, MANY)
    streams.copies.hold()
    transfers = queue(link, MANY)
    wait_until(lambda: transfers[1].done)
    began = time.perf_counter()
    for transfer in transfers[MANY // 2 :]:
        getattr(link, ask)(transfer)
    took = time.perf_counter() - began
    if ask == "cancel":
        assert not link.cancel(transfers[-1]), "it is cancelled already"
    assert took < 0.5, f"{took / (MANY // 2) * 1e6:.0f} us each"
    streams.copies.go()
    link.close()


def test_the_next_prefetch_is_queued_while_one_is_copied(streams: FakeStreams) -> None:
    link = link_of(streams)
    streams.copies.hold()
    first, second = queue(link, 2)
    wait_until(lambda: first.done and second.done)
    assert not first.arrived()
    streams.copies.go()
    link.close()


def test_a_copy_that_cannot_be_queued_fails_its_transfer_and_loses_no_slot(
    streams: FakeStreams, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LockedStore(FakeStore([8], NBYTES))
    link = CudaLink(store, streams, 1, 1)
    with SlotPool([SlotClass(NBYTES, 3)], torch.device("cpu")) as pool:
        cache = ExpertCache(store, link, pool, HotTemporal([8]))
        with monkeypatch.context() as broken:

            def refuse(target: torch.Tensor, source: torch.Tensor, after: Any) -> tuple[Any, Any]:
                raise RuntimeError("CUDA error: out of memory")

            broken.setattr(streams, "copy", refuse)
            for number in range(6):
                with pytest.raises(RuntimeError, match="out of memory"):
                    list(cache.borrow(0, [number]))
                cache.check_integrity()
        assert [loan.experts for loan in cache.borrow(0, [0, 1, 2])] != []
        cache.check_integrity()
        link.close()


def test_the_device_waits_for_the_copy_that_ends_next_in_whatever_order_they_are_asked_for(
    streams: FakeStreams,
) -> None:
    link = link_of(streams)
    memory = torch.zeros(3, NBYTES, dtype=torch.uint8)
    streams.copies.hold()
    first, second, third = (
        link.start(ExpertId(0, number), number, memory[number], Priority.DEMAND) for number in range(3)
    )
    assert link.wait_any([third, second, first]) == [first]
    assert link.wait_any([third, second]) == [second]
    streams.copies.go()
    link.close()


class Stream:
    """A device's stream that notes whom it waits for."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.waits: list[str] = []

    def wait_stream(self, other: Stream) -> None:
        self.waits.append(other.name)


def test_the_first_copy_waits_for_what_was_queued_when_the_memory_of_the_slots_was_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An allocator gives memory out again while work on it is still queued."""
    copies = Stream("copies")
    monkeypatch.setattr(accelerator, "new_stream", lambda device: copies)
    monkeypatch.setattr(accelerator, "current_stream", lambda device: Stream("compute"))
    CudaStreams(torch.device("cuda:0"))
    assert copies.waits == ["compute"]
