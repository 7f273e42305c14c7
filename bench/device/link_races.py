"""The link under races: experts borrowed and prefetched at random, from memory that is really page-locked.

The device is kept far behind the host, so that a slot that is used again too soon shows as a record read wrongly.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from bench.device.section import Found, Target
from bench.device.timing import MIB
from edgemoe.cache import ExpertCache, ExpertId, SlotClass, SlotPool
from edgemoe.cache.cuda_link import CudaLink, CudaStreams, Streams
from edgemoe.cache.eviction.hot_temporal import HotTemporal
from edgemoe.cache.host_store import HostStore
from tests.support.cache_fakes import FakeStore, FakeStreams, LockedStore, pattern

EXPERTS = [8] * 3
SCENES = ((0, 3, 0), (1, 9, 0), (2, 4, 400_000), (3, 9, 400_000))
"""Seed, slots, and the cycles that the card sleeps before each record is read."""


def measure(target: Target) -> Found:
    """How many records were read wrongly."""
    device = torch.device(target.device)
    nbytes, steps = (4096, 40) if target.small else (4 * MIB, 150)
    wrong = locked = 0
    for seed, slots, delay in SCENES:
        with _store(target, nbytes) as store, SlotPool([SlotClass(nbytes, slots)], device) as pool:
            pool.memory.zero_()
            locked += store.pinned_nbytes
            reader = CardReader(pool, device, delay) if target.cuda else LaneReader(pool)
            link = CudaLink(store, reader.streams, 2, 2)
            try:
                _play(ExpertCache(store, link, pool, HotTemporal(EXPERTS)), reader, seed, steps)
                wrong += reader.wrong()
            finally:
                link.close()
                reader.close()
    return Found(
        {"wrong_reads": wrong, "locked_MiB": locked // MIB}, [f"{wrong} records were read wrongly"] if wrong else []
    )


@contextmanager
def _store(target: Target, nbytes: int) -> Iterator[HostStore]:
    """Records of known bytes, page-locked on a card and passing for it without one."""
    source = FakeStore(EXPERTS, nbytes, pieces=2)
    store = HostStore(source, 1 << 30, pin=True) if target.cuda else LockedStore(source)
    try:
        if target.cuda:
            store.fill(4, lambda done, total: None)
            if store.pinned_nbytes != store.nbytes or not store.record(ExpertId(0, 0))[0].is_pinned():
                raise RuntimeError(f"{store.pinned_nbytes} of {store.nbytes} bytes are page-locked")
        yield store
    finally:
        store.close()


def _play(cache: ExpertCache, reader: Reader, seed: int, steps: int) -> None:
    draw = random.Random(seed)
    for step in range(steps):
        layer = step % len(EXPERTS)
        following = (layer + 1) % len(EXPERTS)
        cache.prefetch([ExpertId(following, number) for number in draw.sample(range(8), 2)])
        for loan in cache.borrow(layer, draw.sample(range(8), draw.randint(1, 5))):
            for number, slot in zip(loan.experts, loan.slots, strict=True):
                reader.read(slot, pattern(ExpertId(layer, number)))
        cache.check_integrity()


class Reader(ABC):
    """What computes: it reads slots in the order of its stream, which is behind the host."""

    streams: Streams

    @abstractmethod
    def read(self, slot: int, expected: int) -> None:
        """Queues a look at `slot`, whose bytes should all be `expected`."""

    @abstractmethod
    def wrong(self) -> int:
        """How many looks found something else. Waits for all."""

    @abstractmethod
    def close(self) -> None:
        """Gives the streams back."""


class CardReader(Reader):
    """Kernels on the card's current stream."""

    def __init__(self, pool: SlotPool, device: torch.device, delay: int) -> None:
        self.streams = CudaStreams(device)
        self._pool = pool
        self._delay = delay
        self._wrong: list[torch.Tensor] = []

    def read(self, slot: int, expected: int) -> None:
        """See the base class."""
        if self._delay:
            torch.cuda._sleep(self._delay)
        self._wrong.append((self._pool.regions[0].memory[slot] != expected).any())

    def wrong(self) -> int:
        """See the base class."""
        return int(torch.stack(self._wrong).sum())

    def close(self) -> None:
        """See the base class."""
        torch.cuda.synchronize()


class LaneReader(Reader):
    """Stand-ins for the card's streams, for a dry run."""

    def __init__(self, pool: SlotPool) -> None:
        self.streams: FakeStreams = FakeStreams()
        self._pool = pool
        self._wrong: list[bool] = []

    def read(self, slot: int, expected: int) -> None:
        """See the base class."""
        memory = self._pool.regions[0].memory[slot]
        self.streams.compute.put(lambda: self._wrong.append(bool((memory != expected).any())))

    def wrong(self) -> int:
        """See the base class."""
        self.streams.block(self.streams.mark())
        return sum(self._wrong)

    def close(self) -> None:
        """See the base class."""
        self.streams.end()
