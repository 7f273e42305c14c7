"""Fakes that tests control: a store with known bytes, a link without threads, and the streams of a device."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from edgemoe.cache import ExpertId, ExpertStore, Link, Part, RecordLayout, Transfer
from edgemoe.cache.cuda_link import Streams
from edgemoe.cache.host_buffer import HostBuffer
from edgemoe.cache.host_store import HostStore
from edgemoe.cache.link import Priority
from edgemoe.cache.store import Piece
from tests.support.waiting import PATIENCE


def pattern(expert: ExpertId) -> int:
    """The value of every byte of the record of `expert`: never 0, and distinct for up to 12 layers of 20 experts."""
    return 1 + expert.layer * 20 + expert.number


def holds(memory: torch.Tensor, expert: ExpertId, nbytes: int) -> bool:
    """Whether the first `nbytes` of `memory` are the record of `expert`."""
    return bool((memory[:nbytes] == pattern(expert)).all())


class FakeStore(ExpertStore):
    """Records of constant bytes, in several pieces, whose reads can be blocked or fail per expert."""

    def __init__(self, experts: Sequence[int], nbytes: int | Sequence[int] = 128, pieces: int = 1) -> None:
        """`nbytes` are the bytes of every record, or of each layer's."""
        sizes = [nbytes] * len(experts) if isinstance(nbytes, int) else nbytes
        self.layouts = tuple(RecordLayout([Part("w", (size,), torch.uint8)]) for size in sizes)
        self.experts = tuple(experts)
        self.gates: dict[ExpertId, threading.Event] = {}
        """Events for which the pieces of an expert wait before they write."""
        self.faults: dict[ExpertId, OSError] = {}
        """Errors that the last piece of an expert raises instead of writing."""
        self.started: list[ExpertId] = []
        """The expert of each piece that started, in order."""
        self.closed = False
        self._pieces = pieces

    def pieces(self, expert: ExpertId, slot: torch.Tensor) -> Sequence[Piece]:
        size = self.record_nbytes(expert)
        step = -(-size // self._pieces)
        spans = [(first, min(first + step, size)) for first in range(0, size, step)]

        def piece(first: int, last: int) -> Piece:
            def move() -> None:
                self.started.append(expert)
                if expert in self.gates:
                    assert self.gates[expert].wait(PATIENCE)
                if expert in self.faults and last == size:
                    raise self.faults[expert]
                slot[first:last] = pattern(expert)

            return last - first, move

        return [piece(first, last) for first, last in spans]

    def hold(self, *experts: ExpertId) -> None:
        for expert in experts:
            self.gates[expert] = threading.Event()

    def let(self, *experts: ExpertId) -> None:
        for expert in experts:
            self.gates[expert].set()

    def close(self) -> None:
        self.closed = True


class SuddenTransfer(Transfer):
    """A transfer that ends right after the first call of `arrived`."""

    def __init__(self, link: FakeLink, expert: ExpertId, slot: int, nbytes: int, priority: Priority) -> None:
        super().__init__(expert, slot, nbytes, priority)
        self._link = link

    def arrived(self) -> bool:
        answer = super().arrived()
        if not self.done:
            self._link.finish(self.expert)
        return answer


class FakeLink(Link):
    """A link without threads. A transfer ends by `finish`, or when the cache waits and `choose` selects it.

    `events` logs the calls in order, as (kind, experts or slots). Kinds are "start", "prefetch", "promote", "cancel",
    "wait", "released" and "close".
    """

    def __init__(self, store: ExpertStore) -> None:
        self.store = store
        self.events: list[tuple[str, Any]] = []
        self.in_flight: dict[ExpertId, tuple[Transfer, torch.Tensor]] = {}
        self.faults: dict[ExpertId, OSError] = {}
        self.queued: set[ExpertId] = set()
        """Experts in flight that have not started to move, so that they can be cancelled."""
        self.sudden = False
        """Whether new transfers are `SuddenTransfer`s."""
        self.readable: set[ExpertId] = set()
        """Experts whose current transfer was returned by `wait_any`: only these may be read."""
        self.moved = 0
        """Bytes that crossed the link."""
        self.choose: Callable[[Sequence[Transfer]], Transfer] | None = lambda transfers: transfers[0]
        """Selects the transfer that ends when the cache waits and none has ended. With None, such a wait fails."""

    def start(self, expert: ExpertId, slot: int, memory: torch.Tensor, priority: Priority) -> Transfer:
        assert expert not in self.in_flight, f"{expert} is in flight already"
        nbytes = self.store.record_nbytes(expert)
        transfer = Transfer(expert, slot, nbytes, priority)
        if self.sudden:
            transfer = SuddenTransfer(self, expert, slot, nbytes, priority)
        self.in_flight[expert] = transfer, memory
        self.readable.discard(expert)
        self.events.append(("start" if priority is Priority.DEMAND else "prefetch", expert))
        return transfer

    def finish(self, *experts: ExpertId) -> None:
        for expert in experts:
            transfer, memory = self.in_flight.pop(expert)
            transfer.error = self.faults.pop(expert, None)
            if transfer.error is None:
                self.moved += transfer.nbytes
                for _, move in self.store.pieces(expert, memory):
                    move()
            transfer.done = True

    def promote(self, transfer: Transfer) -> None:
        self.events.append(("promote", transfer.expert))
        transfer.priority = Priority.DEMAND

    def cancel(self, transfer: Transfer) -> bool:
        if transfer.done or transfer.expert not in self.queued:
            return False
        self.events.append(("cancel", transfer.expert))
        del self.in_flight[transfer.expert]
        return True

    def wait_any(self, transfers: Sequence[Transfer], seconds: float | None = None) -> list[Transfer]:
        assert transfers, "waiting for no transfer would never end"
        if not any(transfer.done for transfer in transfers):
            self.events.append(("wait", tuple(transfer.expert for transfer in transfers)))
            assert self.choose is not None, "the cache waits for the link"
            self.finish(self.choose(transfers).expert)
        arrived = [transfer for transfer in transfers if transfer.done]
        self.readable |= {transfer.expert for transfer in arrived if transfer.error is None}
        return arrived

    def released(self, slots: Sequence[int]) -> None:
        self.events.append(("released", tuple(slots)))

    def close(self) -> None:
        self.events.append(("close", None))

    def happened(self, kind: str) -> list[Any]:
        return [what for event, what in self.events if event == kind]


class LockedStore(HostStore):
    """A host store of page-locked records, which without a device only claim to be; those of `pageable` do not.

    A device copies from memory that is not locked when the host asks it to, so that no race would show.
    """

    def __init__(self, source: ExpertStore, pageable: Sequence[ExpertId] = ()) -> None:
        super().__init__(source, source.nbytes, pin=True)
        self.pageable = set(pageable)
        self.fill(2, lambda done, total: None)

    def record(self, expert: ExpertId) -> tuple[torch.Tensor, bool]:
        return super().record(expert)[0], expert not in self.pageable


class Lane:
    """A stream: runs work in order on its own thread. `hold` pauses it, `go` resumes it."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._open = threading.Event()
        self._open.set()
        self.failures: list[BaseException] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def put(self, work: Callable[[], object]) -> None:
        self._work.put(work)

    def hold(self) -> None:
        self._open.clear()

    def go(self) -> None:
        self._open.set()

    def end(self) -> None:
        self.go()
        self._work.put(None)
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "a stream waits for an event that never passes"
        assert not self.failures, self.failures[0]

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            assert self._open.wait(PATIENCE)
            try:
                work()
            except BaseException as error:
                self.failures.append(error)


class Mark(threading.Event):
    """An event of `FakeStreams`; `at` is the time at which it passed."""

    def __init__(self) -> None:
        super().__init__()
        self.at = 0.0

    def set(self) -> None:
        self.at = time.perf_counter()
        super().set()


class FakeStreams(Streams):
    """A device with one lane for copies and one for compute. Its events are `Mark`s."""

    def __init__(self, copy_seconds: Callable[[], float] = lambda: 0.0) -> None:
        self.copies = Lane()
        self.compute = Lane()
        self.issued: list[int] = []
        """The first byte of each copy's source when the copy was queued, in order."""
        self._copy_seconds = copy_seconds

    def staging(self, nbytes: int) -> HostBuffer:
        return HostBuffer(nbytes, pin=False)

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Any) -> tuple[Mark, Mark]:
        start, end = Mark(), Mark()

        def work() -> None:
            assert after is None or after.wait(PATIENCE)
            start.set()
            time.sleep(self._copy_seconds())
            target.copy_(source)
            end.set()

        self.issued.append(int(source[0]))
        self.copies.put(work)
        return start, end

    def mark(self) -> Mark:
        event = Mark()
        self.compute.put(event.set)
        return event

    def compute_after(self, event: Any) -> tuple[Mark, Mark] | None:
        if event.is_set():
            return None
        start, end = Mark(), Mark()

        def work() -> None:
            start.set()
            assert event.wait(PATIENCE)
            end.set()

        self.compute.put(work)
        return start, end

    def passed(self, event: Any) -> bool:
        return bool(event.is_set())

    def block(self, event: Any) -> None:
        assert event.wait(PATIENCE), "the host waits for a copy that never ends"

    def seconds(self, start: Any, end: Any) -> float:
        assert start.is_set()
        assert end.is_set()
        return float(end.at - start.at)

    def end(self) -> None:
        self.copies.end()
        self.compute.end()
