"""The link of a machine with a CUDA device: asynchronous copies from page-locked RAM on a separate stream.

The calling thread issues the copy of a demand load whose record is page-locked. A dispatching thread handles the rest:
prefetches, of which few are on the bus so that demand loads overtake the others, and records that are first read into
a page-locked staging buffer. The calling thread never waits for a copy; the compute stream does.
"""

from __future__ import annotations

import itertools
import threading
import time
from abc import ABC, abstractmethod
from collections import OrderedDict, deque
from collections.abc import Sequence
from concurrent.futures import wait
from typing import Any

import torch

from edgemoe.cache import accelerator
from edgemoe.cache.host_buffer import HostBuffer
from edgemoe.cache.host_store import HostStore
from edgemoe.cache.link import CLOSE_SECONDS, Link, Priority, ReaderThreads, Throttle, Transfer
from edgemoe.cache.record import ExpertId
from edgemoe.cache.store import ExpertStore

MAX_ON_BUS = 2
"""Prefetches that are queued on the device: the next copy starts when one ends, without the host in between."""
POLL_SECONDS = 1e-3
"""How often the dispatching thread, with nothing else to do, looks whether a prefetch has ended, to count it."""


class Streams(ABC):
    """The device operations of the link: ordered copies, their durations, and events between copies and compute."""

    @abstractmethod
    def staging(self, nbytes: int) -> HostBuffer:
        """A host buffer of `nbytes`, page-locked where the system allows. The caller closes it."""

    @abstractmethod
    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Any) -> tuple[Any, Any]:
        """Queues a copy after all earlier copies and the event `after`, if any. Returns its start and end events.

        The start event passes when the copy has nothing left to wait for, so copies never overlap. Thread-safe.
        """

    @abstractmethod
    def mark(self) -> Any:
        """Records an event on the caller's compute stream, after the work queued so far."""

    @abstractmethod
    def compute_after(self, event: Any) -> tuple[Any, Any] | None:
        """Makes later work on the caller's compute stream wait for `event`. Does not block the host.

        Returns the start and end events of the wait; None where `event` has passed already.
        """

    @abstractmethod
    def passed(self, event: Any) -> bool:
        """Whether `event` has passed."""

    @abstractmethod
    def block(self, event: Any) -> None:
        """Blocks the calling thread until `event` has passed."""

    @abstractmethod
    def seconds(self, start: Any, end: Any) -> float:
        """Seconds between the start and end events of a copy or a wait. Both must have passed."""


class CudaStreams(Streams):
    """CUDA streams and events, with one copy stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = accelerator.new_stream(device)
        # The slots may lie where work that is still queued on the compute stream reads or writes something else.
        self._copies.wait_stream(accelerator.current_stream(device))
        self._queueing = threading.Lock()

    def staging(self, nbytes: int) -> HostBuffer:
        """See the base class."""
        return HostBuffer(nbytes, pin=True)

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Any) -> tuple[Any, Any]:
        """See the base class."""
        start, end = accelerator.new_event(timed=True), accelerator.new_event(timed=True)
        # A copy of another thread between the two events would count in the durations of both copies.
        with self._queueing, accelerator.on_stream(self._copies):
            if after is not None:
                self._copies.wait_event(after)
            self._copies.record_event(start)
            target.copy_(source, non_blocking=True)
            self._copies.record_event(end)
        return start, end

    def mark(self) -> Any:
        """See the base class."""
        return accelerator.current_stream(self._device).record_event()

    def compute_after(self, event: Any) -> tuple[Any, Any] | None:
        """See the base class."""
        if event.query():
            return None
        compute = accelerator.current_stream(self._device)
        start, end = accelerator.new_event(timed=True), accelerator.new_event(timed=True)
        compute.record_event(start)
        compute.wait_event(event)
        compute.record_event(end)
        return start, end

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
    """A transfer. `done` means that its copy is queued; `event` passes when the slot holds the complete record."""

    def __init__(self, streams: Streams, expert: ExpertId, slot: int, nbytes: int, priority: Priority) -> None:
        super().__init__(expert, slot, nbytes, priority)
        self._streams = streams
        self.start: Any = None
        self.event: Any = None
        self.fetched = 0.0
        """Seconds until its copy could be queued: time for reading the record, or for the simulated bandwidth."""
        self.order = 0
        """Its place among the copies that were queued."""
        self.copied_before = 0.0
        """The value of `CudaLink._copied` when the fetch started."""

    def arrived(self) -> bool:
        """See the base class."""
        return super().arrived() and self._streams.passed(self.event)


class CudaLink(Link):
    """Copies records of `store` into the slots of a device.

    Page-locked records of a `HostStore` are copied directly. All others go through a ring of `staging` buffers, which
    `readers` threads fill; there must be at least one unless every record is page-locked.
    """

    def __init__(
        self, store: ExpertStore, streams: Streams, staging: int, readers: int, throttle: Throttle | None = None
    ) -> None:
        self._store = store
        self._streams = streams
        self._throttle = throttle
        self._readers = ReaderThreads(readers, "edgemoe-read")
        self._ring: list[tuple[HostBuffer, Any]] = [(streams.staging(store.slot_nbytes), None) for _ in range(staging)]
        self._last_use: dict[int, Any] = {}
        self._last_use_of_others: Any = None
        """The event behind which every slot that `_last_use` does not name may be written."""
        self._in_flight: deque[_Copy] = deque()
        self._waits: deque[tuple[Any, Any]] = deque()
        """The start and end events of the compute stream's waits that are not counted yet."""
        self._copied = 0.0
        """Total seconds of the copies counted so far."""
        self._overlapped = 0.0
        """The part of `_copied`, from its start, with which no later fetch can overlap."""
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._issued = threading.Condition(self._lock)
        self._queues: dict[Priority, OrderedDict[Transfer, tuple[_Copy, torch.Tensor]]]
        self._queues = {priority: OrderedDict() for priority in Priority}
        """What the dispatching thread has not begun, by the order of service."""
        self._on_bus: deque[_Copy] = deque()
        """Prefetches on the device's queue whose end the dispatching thread has not seen."""
        self._order = itertools.count()
        self._closed = False
        self._left_alone = False
        """Whether `close` has not waited for the dispatching thread: slots and buffers may be gone."""
        self._thread = self._start_dispatching()

    def start(self, expert: ExpertId, slot: int, memory: torch.Tensor, priority: Priority) -> Transfer:
        """See the base class."""
        copy = _Copy(self._streams, expert, slot, self._store.record_nbytes(expert), priority)
        pinned = self._pinned(expert)
        if priority is Priority.DEMAND and pinned is not None and self._throttle is None:
            try:
                self._issue(copy, memory, pinned)
            except Exception as error:
                # The caller has given the slot away: it learns of the failure where it waits for the transfer.
                copy.error = error
                copy.done = True
            return copy
        with self._lock:
            self._queues[priority][copy] = copy, memory
            self._work.notify()
        return copy

    def promote(self, transfer: Transfer) -> None:
        """See the base class."""
        with self._lock:
            entry = self._queues[Priority.PREFETCH].pop(transfer, None)
            if entry is not None:
                self._queues[Priority.DEMAND][transfer] = entry
                self._work.notify()
            transfer.priority = Priority.DEMAND

    def cancel(self, transfer: Transfer) -> bool:
        """See the base class."""
        with self._lock:
            return any(queue.pop(transfer, None) is not None for queue in self._queues.values())

    def wait_any(self, transfers: Sequence[Transfer], seconds: float | None = None) -> list[Transfer]:
        """See the base class. Blocks the host only while none of the copies is queued on the device."""
        with self._lock:
            self._issued.wait_for(lambda: any(transfer.done for transfer in transfers), seconds)
            issued = [transfer for transfer in transfers if transfer.done]
            self._count()
        failed = [transfer for transfer in issued if transfer.error is not None]
        copies = [transfer for transfer in issued if isinstance(transfer, _Copy) and transfer.error is None]
        # Records that have arrived are computed first. Without any, the device waits for the copy that ends next.
        ready = [copy for copy in copies if copy.arrived()]
        if not ready and copies:
            ready = [min(copies, key=lambda copy: copy.order)]
        for copy in ready:
            waited = self._streams.compute_after(copy.event)
            if waited is not None:
                self._waits.append(waited)
        return [*ready, *failed]

    def released(self, slots: Sequence[int]) -> None:
        """See the base class."""
        if slots:
            event = self._streams.mark()
            for slot in slots:
                self._last_use[slot] = event
        with self._lock:
            self._count()

    def released_all(self) -> None:
        """See the base class."""
        self._last_use_of_others = self._streams.mark()
        self._last_use = {}

    def close(self) -> None:
        """See the base class."""
        with self._lock:
            self._closed = True
            for queue in self._queues.values():
                queue.clear()
            self._work.notify()
        self._thread.join(CLOSE_SECONDS)
        # Where that waits for a read, its buffer and a thread stay with the read until it returns.
        self._left_alone = self._thread.is_alive()
        self._readers.shutdown(0 if self._left_alone else CLOSE_SECONDS)
        for copy in self._in_flight:
            self._streams.block(copy.event)
        with self._lock:
            self._count()
        for buffer, _ in self._ring:
            buffer.close()
        self._ring.clear()

    def _start_dispatching(self) -> threading.Thread:
        """The last thing that the constructor does. A test may run `_dispatch` on another kind of thread."""
        thread = threading.Thread(target=self._dispatch, name="edgemoe-copy", daemon=True)
        thread.start()
        return thread

    def _pinned(self, expert: ExpertId) -> torch.Tensor | None:
        if isinstance(self._store, HostStore):
            record, locked = self._store.record(expert)
            return record if locked else None
        return None

    def _issue(self, copy: _Copy, memory: torch.Tensor, source: torch.Tensor) -> None:
        size = self._store.record_nbytes(copy.expert)
        copy.start, copy.event = self._streams.copy(
            memory[:size], source[:size], self._last_use.get(copy.slot, self._last_use_of_others)
        )
        copy.order = next(self._order)
        copy.done = True
        with self._lock:
            self._count()
            self._in_flight.append(copy)

    def _count(self) -> None:
        """Adds the completed copies and waits to the totals. Does not block. The lock is held."""
        while self._waits and self._streams.passed(self._waits[0][1]):
            self.device_wait_seconds += self._streams.seconds(*self._waits.popleft())
        while self._in_flight and self._streams.passed(self._in_flight[0].event):
            copy = self._in_flight.popleft()
            seconds = self._streams.seconds(copy.start, copy.event)
            # The time of a fetch counts as busy, except where it overlaps with other copies, which count themselves.
            # An overlap with a copy is subtracted from one fetch only.
            known = max(copy.copied_before, self._overlapped)
            overlap = min(copy.fetched, self._copied - known)
            self._overlapped = known + overlap
            self._copied += seconds
            self.busy_seconds += seconds + copy.fetched - overlap
            self.bytes_moved += copy.nbytes

    def _dispatch(self) -> None:
        while True:
            with self._lock:
                entry = self._next()
                if self._closed:
                    return
            if entry is None:
                # The bus holds as many prefetches as it may, and there is nothing but more of them to do.
                self._streams.block(self._on_bus[0].event)
                continue
            copy, memory = entry
            try:
                self._serve(copy, memory)
            except Exception as error:
                copy.error = error
                copy.done = True
            with self._lock:
                self._issued.notify_all()
            if copy.priority is Priority.PREFETCH and copy.error is None:
                self._on_bus.append(copy)

    def _next(self) -> tuple[_Copy, torch.Tensor] | None:
        """What to do next, taken from the queue; None if first a prefetch has to leave the bus, or when closed.

        Waits while there is nothing. The lock is held.
        """
        demands, prefetches = self._queues[Priority.DEMAND], self._queues[Priority.PREFETCH]
        while True:
            self._leave_bus()
            if self._closed:
                return None
            queue = demands or prefetches
            if queue is prefetches and len(self._on_bus) >= MAX_ON_BUS:
                return None
            if queue:
                return queue.popitem(last=False)[1]
            self._work.wait(POLL_SECONDS if self._on_bus else None)

    def _leave_bus(self) -> None:
        """Counts the prefetches that have ended. The lock is held."""
        while self._on_bus and self._on_bus[0].arrived():
            self._on_bus.popleft()
            self._count()

    def _serve(self, copy: _Copy, memory: torch.Tensor) -> None:
        started = time.perf_counter()
        with self._lock:
            self._count()
            copy.copied_before = self._copied
        arrival = self._throttle.book(copy.nbytes) if self._throttle else 0.0
        source = self._pinned(copy.expert)
        if source is not None:
            Throttle.sleep_until(arrival)
            copy.fetched = time.perf_counter() - started
            self._issue(copy, memory, source)
            return
        buffer, last = self._ring.pop(0)
        try:
            if last is not None:
                self._streams.block(last)
            pieces = self._store.pieces(copy.expert, buffer.memory)
            reads = [self._readers.submit(move) for _, move in pieces]
            # Wait for all reads even after a failure: the next user of the buffer must be its only writer.
            while wait(reads, POLL_SECONDS if self._on_bus else None).not_done:
                with self._lock:
                    self._leave_bus()
            for read in reads:
                read.result()
            if self._left_alone:
                raise RuntimeError("a read returned after the end of its link")
            Throttle.sleep_until(arrival)
            copy.fetched = time.perf_counter() - started
            self._issue(copy, memory, buffer.memory)
            last = copy.event
        finally:
            self._ring.append((buffer, last))
