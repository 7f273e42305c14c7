"""What moves records between tiers: transfers with priorities, and a throttle for experiments."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from enum import IntEnum

import torch

from edgemoe.cache.record import ExpertId


class Priority(IntEnum):
    """Which transfer the link serves first."""

    DEMAND = 0
    PREFETCH = 1


class Transfer:
    """One record on its way into a slot. Made by a link; `done` and `error` are set by the link."""

    def __init__(self, expert: ExpertId, slot: int, nbytes: int, priority: Priority) -> None:
        self.expert = expert
        self.slot = slot
        self.nbytes = nbytes
        self.priority = priority
        self.done = False
        self.error: BaseException | None = None

    def arrived(self) -> bool:
        """Whether the record is whole in its slot and may be read without waiting."""
        return self.done and self.error is None


class Link(ABC):
    """Moves records into slots. `start`, `promote` and `wait_any` are called from one thread."""

    busy_seconds: float = 0.0
    """Time in which something was on its way, up to the last arrival, where the link can tell."""
    bytes_moved: int = 0
    """Bytes that have arrived in that time; over it, the bandwidth reached."""

    @abstractmethod
    def start(self, expert: ExpertId, slot: int, memory: torch.Tensor, priority: Priority) -> Transfer:
        """Begins to fill `memory`, the uint8 slot of index `slot` on the device. Never blocks on the data.

        The memory belongs to the link until the transfer is done.
        """

    @abstractmethod
    def promote(self, transfer: Transfer) -> None:
        """Makes a prefetch a demanded load: what is left of it overtakes every other prefetch."""

    @abstractmethod
    def cancel(self, transfer: Transfer) -> bool:
        """Takes a transfer of which nothing has moved yet off the link; whether it could. Its slot is free then."""

    @abstractmethod
    def wait_any(self, transfers: Sequence[Transfer]) -> list[Transfer]:
        """Blocks until at least one of `transfers` is done and returns all that are, in the given order.

        Afterwards the caller's device stream may read their slots; this is also how a record that arrived
        unasked becomes readable. A transfer that failed is returned as well, with its `error` set.
        """

    @abstractmethod
    def released(self, slots: Sequence[int]) -> None:
        """Tells that the work queued so far on the caller's device stream is the last to read `slots`."""

    @abstractmethod
    def close(self) -> None:
        """Waits for what is on the way, drops what is queued, ends the threads. Idempotent."""


class Throttle:
    """Slows a link down to a simulated bandwidth, so that results compare between machines.

    One shared clock says when the simulated link is free; each piece books its time and sleeps until
    its booking is over. A real link slower than the simulated one is not slowed further.
    """

    def __init__(self, bytes_per_second: float) -> None:
        if bytes_per_second <= 0:
            raise ValueError(f"a simulated bandwidth must be above 0 bytes/s, not {bytes_per_second}")
        self.bytes_per_second = bytes_per_second
        self._free_at = 0.0
        self._lock = threading.Lock()

    def book(self, nbytes: int) -> float:
        """Books the next `nbytes` and returns the time (perf_counter) at which they have arrived."""
        with self._lock:
            self._free_at = max(self._free_at, time.perf_counter()) + nbytes / self.bytes_per_second
            return self._free_at

    @staticmethod
    def sleep_until(arrival: float) -> None:
        """Sleeps until the booked arrival; returns at once when it is past."""
        remaining = arrival - time.perf_counter()
        if remaining > 0:
            time.sleep(remaining)
