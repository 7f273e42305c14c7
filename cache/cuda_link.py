"""The link of a machine with a CUDA device: asynchronous copies from page-locked RAM on streams of their own.

A demanded record that is page-locked is copied by the calling thread at once; everything else goes
through one dispatching thread: prefetches, of which at most one is on the bus so that demands overtake
them, and records that must first be brought into a page-locked staging buffer, from RAM or from a file.
The host never waits for a copy: the compute stream does.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import torch

from edgemoe.cache.host_store import HostStore
from edgemoe.cache.link import Link, Priority, Throttle, Transfer
from edgemoe.cache.record import ExpertId
from edgemoe.cache.store import ExpertStore


class Streams(ABC):
    """What the link needs of a device: copies in order, their times, and events between copies and compute."""

    @abstractmethod
    def staging(self, nbytes: int) -> torch.Tensor:
        """A host buffer, uint8 [nbytes], from which copies are asynchronous."""

    @abstractmethod
    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Any) -> tuple[Any, Any]:
        """Queues a copy behind those before it and the event `after` (or None); the events of its start and end.

        It starts when nothing is left that it waits for, so that no two copies overlap. Any thread may call.
        """

    @abstractmethod
    def mark(self) -> Any:
        """An event behind the work queued so far on the caller's compute stream."""

    @abstractmethod
    def compute_after(self, event: Any) -> None:
        """Makes what the caller queues from now on wait for `event`. Does not block the host."""

    @abstractmethod
    def passed(self, event: Any) -> bool:
        """Whether `event` has passed."""

    @abstractmethod
    def block(self, event: Any) -> None:
        """Blocks the calling thread until `event` has passed."""

    @abstractmethod
    def seconds(self, start: Any, end: Any) -> float:
        """How long a copy took, of which both events have passed."""


class CudaStreams(Streams):
    """The real ones: one copy stream, CUDA events."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device)
        self._queueing = threading.Lock()

    def staging(self, nbytes: int) -> torch.Tensor:
        """See the base class; ordinary memory where the system refuses to lock any."""
        try:
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        except RuntimeError:
            return torch.empty(nbytes, dtype=torch.uint8)

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Any) -> tuple[Any, Any]:
        """See the base class."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # What another thread queued between the two events would be part of both copies' times.
        with self._queueing, torch.cuda.stream(self._copies):
            if after is not None:
                self._copies.wait_event(after)
            self._copies.record_event(start)
            target.copy_(source, non_blocking=True)
            self._copies.record_event(end)
        return start, end

    def mark(self) -> Any:
        """See the base class."""
        return torch.cuda.current_stream(self._device).record_event()

    def compute_after(self, event: Any) -> None:
        """See the base class."""
        torch.cuda.current_stream(self._device).wait_event(event)

    def passed(self, event: Any) -> bool:
        """See the base class."""
        return bool(event.query())

    def block(self, event: Any) -> None:
        """See the base class."""
        event.synchronize()

    def seconds(self, start: Any, end: Any) -> float:
        """See the base class."""
        return float(start.elapsed_time(end)) / 1e3


class _Copy(Transfer):
    """A transfer whose `done` means that its copy is queued; `event` passes when the record is whole."""

    def __init__(self, streams: Streams, expert: ExpertId, slot: int, nbytes: int, priority: Priority) -> None:
        super().__init__(expert, slot, nbytes, priority)
        self._streams = streams
        self.start: Any = None
        self.event: Any = None
        self.fetched = 0.0
        """Seconds that went by until it could be queued: its record was read, or a slower link simulated."""
        self.copied_before = 0.0
        """What `CudaLink._copied` was when they began."""

    def arrived(self) -> bool:
        """See the base class."""
        return super().arrived() and self._streams.passed(self.event)


class CudaLink(Link):
    """Copies records into a device's slots. `store` is a `HostStore`, or any store read through the staging ring."""

    def __init__(
        self, store: ExpertStore, streams: Streams, staging: int, readers: int, throttle: Throttle | None = None
    ) -> None:
        self._store = store
        self._streams = streams
        self._throttle = throttle
        self._readers = ThreadPoolExecutor(readers, "edgemoe-read")
        self._ring: list[tuple[torch.Tensor, Any]] = [
            (streams.staging(store.slot_nbytes), None) for _ in range(staging)
        ]
        self._last_use: dict[int, Any] = {}
        self._in_flight: list[_Copy] = []
        self._copied = 0.0
        """Seconds that the copies counted so far took."""
        self._overlapped = 0.0
        """How many of these, from the first on, can overlap with no later fetch."""
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._issued = threading.Condition(self._lock)
        self._queue: list[tuple[Priority, int, _Copy, torch.Tensor]] = []
        self._order = itertools.count()
        self._closed = False
        self._thread = threading.Thread(target=self._dispatch, name="edgemoe-copy", daemon=True)
        self._thread.start()

    def start(self, expert: ExpertId, slot: int, memory: torch.Tensor, priority: Priority) -> Transfer:
        """See the base class."""
        copy = _Copy(self._streams, expert, slot, self._store.record_nbytes(expert), priority)
        pinned = self._pinned(expert)
        if priority is Priority.DEMAND and pinned is not None and self._throttle is None:
            self._issue(copy, memory, pinned)
            return copy
        with self._lock:
            heapq.heappush(self._queue, (priority, next(self._order), copy, memory))
            self._work.notify()
        return copy

    def promote(self, transfer: Transfer) -> None:
        """See the base class."""
        with self._lock:
            for position, (priority, order, copy, memory) in enumerate(self._queue):
                if copy is transfer and priority is Priority.PREFETCH:
                    self._queue[position] = (Priority.DEMAND, order, copy, memory)
                    heapq.heapify(self._queue)
                    break
            transfer.priority = Priority.DEMAND

    def cancel(self, transfer: Transfer) -> bool:
        """See the base class."""
        with self._lock:
            kept = [entry for entry in self._queue if entry[2] is not transfer]
            found = len(kept) < len(self._queue)
            if found:
                self._queue = kept
                heapq.heapify(self._queue)
            return found

    def wait_any(self, transfers: Sequence[Transfer]) -> list[Transfer]:
        """See the base class. Blocks the host only while nothing is queued on the device yet."""
        with self._lock:
            while not any(transfer.done for transfer in transfers):
                self._issued.wait()
            issued = [transfer for transfer in transfers if transfer.done]
            self._count()
        # What is there already is computed first; only when nothing is does the device wait for the oldest.
        ready = [transfer for transfer in issued if transfer.arrived()] or issued[:1]
        failed = [transfer for transfer in issued if transfer.error is not None and transfer not in ready]
        for transfer in ready:
            assert isinstance(transfer, _Copy)
            if transfer.error is None:
                self._streams.compute_after(transfer.event)
        return ready + failed

    def released(self, slots: Sequence[int]) -> None:
        """See the base class."""
        if slots:
            event = self._streams.mark()
            for slot in slots:
                self._last_use[slot] = event
        with self._lock:
            self._count()

    def close(self) -> None:
        """See the base class."""
        with self._lock:
            self._closed = True
            self._queue.clear()
            self._work.notify()
        self._thread.join()
        self._readers.shutdown()
        for copy in self._in_flight:
            self._streams.block(copy.event)
        with self._lock:
            self._count()
        self._ring.clear()

    def _pinned(self, expert: ExpertId) -> torch.Tensor | None:
        if isinstance(self._store, HostStore):
            record, locked = self._store.record(expert)
            return record if locked else None
        return None

    def _issue(self, copy: _Copy, memory: torch.Tensor, source: torch.Tensor) -> None:
        size = self._store.record_nbytes(copy.expert)
        copy.start, copy.event = self._streams.copy(memory[:size], source[:size], self._last_use.get(copy.slot))
        copy.done = True
        with self._lock:
            self._count()
            self._in_flight.append(copy)

    def _count(self) -> None:
        """Adds the copies that have passed to the totals. Blocks on none of them; the lock is held."""
        while self._in_flight and self._streams.passed(self._in_flight[0].event):
            copy = self._in_flight.pop(0)
            seconds = self._streams.seconds(copy.start, copy.event)
            # A record arrives no faster than it is fetched, so that this counts as well, less the copies of others
            # meanwhile, which are in the total. A copy that two fetches overlap with is taken off once.
            known = max(copy.copied_before, self._overlapped)
            overlap = min(copy.fetched, self._copied - known)
            self._overlapped = known + overlap
            self._copied += seconds
            self.busy_seconds += seconds + copy.fetched - overlap
            self.bytes_moved += copy.nbytes

    def _dispatch(self) -> None:
        while True:
            with self._lock:
                while not self._queue and not self._closed:
                    self._work.wait()
                if self._closed:
                    return
                _, _, copy, memory = heapq.heappop(self._queue)
            try:
                self._serve(copy, memory)
            except Exception as error:
                copy.error = error
                copy.done = True
            with self._lock:
                self._issued.notify_all()
            if copy.priority is Priority.PREFETCH and copy.error is None:
                self._streams.block(copy.event)
                with self._lock:
                    self._count()

    def _serve(self, copy: _Copy, memory: torch.Tensor) -> None:
        began = time.perf_counter()
        with self._lock:
            self._count()
            copy.copied_before = self._copied
        arrival = self._throttle.book(copy.nbytes) if self._throttle else 0.0
        source = self._pinned(copy.expert)
        if source is not None:
            Throttle.sleep_until(arrival)
            copy.fetched = time.perf_counter() - began
            self._issue(copy, memory, source)
            return
        buffer, last = self._ring.pop(0)
        try:
            if last is not None:
                self._streams.block(last)
            pieces = self._store.pieces(copy.expert, buffer)
            reads = [self._readers.submit(move) for _, move in pieces]
            # All of them, even after a failure: whoever gets the buffer next must be its only writer.
            wait(reads)
            for read in reads:
                read.result()
            Throttle.sleep_until(arrival)
            copy.fetched = time.perf_counter() - began
            self._issue(copy, memory, buffer)
            last = copy.event
        finally:
            self._ring.append((buffer, last))
