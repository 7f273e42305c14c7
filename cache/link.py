"""The interface of links, which move records into slots; their transfers and readers; and a simulated bandwidth."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from enum import IntEnum
from queue import SimpleQueue

import torch

from edgemoe.cache.record import ExpertId

CLOSE_SECONDS = 5.0
"""How long the end of a read is waited for: a disk that has gone may never give one."""


class Priority(IntEnum):
    """The order of service: demand loads before prefetches."""

    DEMAND = 0
    PREFETCH = 1


class Transfer:
    """The transfer of one record into a slot. The link creates it, and sets `done` and `error`.

    With an `error`, the link may write the slot until the transfer is done.
    """

    def __init__(self, expert: ExpertId, slot: int, nbytes: int, priority: Priority) -> None:
        self.expert = expert
        self.slot = slot
        self.nbytes = nbytes
        self.priority = priority
        self.done = False
        self.error: BaseException | None = None

    def arrived(self) -> bool:
        """Whether the slot holds the complete record, so that reading it does not wait."""
        return self.done and self.error is None


class Link(ABC):
    """Moves records into slots. All methods are called from one thread."""

    busy_seconds: float = 0.0
    """Time with at least one transfer in flight, up to the last arrival."""
    bytes_moved: int = 0
    """Bytes that arrived. Divided by `busy_seconds` they give the bandwidth."""
    device_wait_seconds: float = 0.0
    """Time for which a device waited for transfers without the host: `wait_any` had returned already."""

    @abstractmethod
    def start(self, expert: ExpertId, slot: int, memory: torch.Tensor, priority: Priority) -> Transfer:
        """Starts to load the record of `expert` into `memory`, the slot `slot`. Never blocks on the data or raises.

        `memory` is uint8 [slot bytes] on the device. Only the link may write it until the transfer is done.
        """

    @abstractmethod
    def promote(self, transfer: Transfer) -> None:
        """Turns a prefetch into a demand load: the rest of it is served before all prefetches."""

    @abstractmethod
    def cancel(self, transfer: Transfer) -> bool:
        """Cancels a transfer unless it has started to move. Returns whether it did; the slot is then free."""

    @abstractmethod
    def wait_any(self, transfers: Sequence[Transfer], seconds: float | None = None) -> list[Transfer]:
        """Blocks until at least one of `transfers` is done, and returns those that are, in the given order.

        Returns none of them where none is done after `seconds`; None waits for ever. The caller's device stream may
        read the slots of the returned transfers, and of no others. Prefetched records need this call as well. Failed
        transfers are returned with their `error` set.
        """

    @abstractmethod
    def released(self, slots: Sequence[int]) -> None:
        """Declares that no work after that already queued on the caller's device stream reads `slots`."""

    def released_all(self) -> None:  # noqa: B027
        """As `released` for every slot. For a caller that does not know which ones its queued work reads."""

    @abstractmethod
    def close(self) -> None:
        """Drops queued transfers, waits for those that have started, and ends the threads. Idempotent.

        A read that has not returned after `CLOSE_SECONDS` is left alone with its thread, a daemon: the memory that it
        writes to stays its own, and is freed when it returns.
        """


class ReaderThreads:
    """Daemon threads that call functions: at its end a process does not wait for a read that never returns.

    Used from one thread. At most `count` threads start, when there is something to do.
    """

    def __init__(self, count: int, name: str) -> None:
        self._calls: SimpleQueue[tuple[Future[None], Callable[[], None]] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._count = count
        self._name = name

    def submit(self, function: Callable[[], None]) -> Future[None]:
        """Has a thread call `function`; the future has its end, or its error."""
        if len(self._threads) < self._count:
            thread = threading.Thread(target=self._serve, name=f"{self._name}-{len(self._threads)}", daemon=True)
            thread.start()
            self._threads.append(thread)
        future: Future[None] = Future()
        self._calls.put((future, function))
        return future

    def shutdown(self, seconds: float) -> None:
        """Ends the threads once they have done what was submitted, and waits for them `seconds` at most."""
        for _ in self._threads:
            self._calls.put(None)
        join_all(self._threads, seconds)

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            future, function = call
            try:
                function()
            except BaseException as error:
                future.set_exception(read_error(error))
            else:
                future.set_result(None)
            del call, future, function


def join_all(threads: Sequence[threading.Thread], seconds: float) -> None:
    """Waits for the end of `threads`, `seconds` at most for all of them together."""
    end = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))


def read_error(error: BaseException) -> Exception:
    """`error` as a link tells it to who waits. What would end a thread, such as SystemExit, is not for that one."""
    return error if isinstance(error, Exception) else RuntimeError(f"a read of an expert was ended by {error!r}")


class Throttle:
    """A simulated bandwidth, in bytes per second, that makes results comparable between machines.

    Each piece books its time on the simulated link and ends no earlier than its booking. A link whose real bandwidth is
    lower is not slowed down. Raises ValueError for a bandwidth that is not above 0. Thread-safe.
    """

    def __init__(self, bytes_per_second: float) -> None:
        if bytes_per_second <= 0:
            raise ValueError(f"a simulated bandwidth must be above 0 bytes/s, not {bytes_per_second}")
        self.bytes_per_second = bytes_per_second
        self._free_at = 0.0
        self._lock = threading.Lock()

    def book(self, nbytes: int) -> float:
        """Books the next `nbytes` and returns their time of arrival, on the clock of `time.perf_counter`."""
        with self._lock:
            self._free_at = max(self._free_at, time.perf_counter()) + nbytes / self.bytes_per_second
            return self._free_at

    @staticmethod
    def sleep_until(arrival: float) -> None:
        """Sleeps until `arrival`, a time that `book` returned. Returns at once when it is past."""
        remaining = arrival - time.perf_counter()
        if remaining > 0:
            time.sleep(remaining)
