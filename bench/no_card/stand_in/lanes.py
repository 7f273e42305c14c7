"""A device that is no card: two lanes of queued work, done step by step in an order that a seed chooses.

The host, the link's dispatcher and the device take turns in one thread, so that a seed always gives the same schedule.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import torch
from greenlet import getcurrent, greenlet

from edgemoe.cache.cuda_link import CudaLink, Streams
from edgemoe.cache.host_buffer import HostBuffer
from edgemoe.cache.link import ReaderThreads
from edgemoe.cache.store import ExpertStore
from edgemoe.experts.host_reads import HostRead, HostReads

MAX_IDLE_TURNS = 10_000
"""Turns of the dispatcher without a step of the device after which whoever waits is taken to wait for ever."""


class Deadlock(Exception):
    """Somebody waits for what can no longer happen."""


class Event:
    """Passes when its lane comes to it; `at` is the step of the device at which it did."""

    __slots__ = ("at", "passed")

    def __init__(self) -> None:
        self.passed = False
        self.at = 0


class Queued(NamedTuple):
    """Work of a lane, which is done in one step once the event `after` has passed."""

    work: Callable[[], None]
    after: Event | None


class Device:
    """Two lanes, each in order. Which one does the next step is drawn, among those that wait for no event."""

    def __init__(self, draw: random.Random) -> None:
        self.compute: deque[Queued] = deque()
        self.copies: deque[Queued] = deque()
        self.writing: set[int] = set()
        """Slots into which a copy is half done, by the addresses of their first bytes."""
        self.steps = 0
        self._draw = draw.random
        # Schedules in which one lane is far ahead of the other are among them.
        self._compute_share = draw.choice((0.1, 0.5, 0.9))

    def queue(self, lane: deque[Queued], work: Callable[[], None], after: Event | None = None) -> None:
        """Adds `work` to the end of `lane`, one of `compute` and `copies`."""
        lane.append(Queued(work, after))

    def record(self, lane: deque[Queued], after: Event | None = None) -> Event:
        """Queues an event, which passes once all that `lane` has now is done, and `after` has passed."""
        event = Event()
        lane.append(Queued(lambda: self.passes(event), after))
        return event

    def passes(self, event: Event) -> None:
        """`event` passes in this step."""
        event.passed, event.at = True, self.steps

    def step(self) -> bool:
        """Does the next work of a lane; False where there is none that could be done."""
        first, second = self.compute, self.copies
        if self._draw() >= self._compute_share:
            first, second = second, first
        for lane in (first, second):
            if lane and (lane[0].after is None or lane[0].after.passed):
                self.steps += 1
                lane.popleft().work()
                return True
        return False

    def finish(self) -> None:
        """Does all that is queued. Raises Deadlock if it cannot be done."""
        while self.step():
            pass
        if self.compute or self.copies:
            raise Deadlock("the lanes of the device wait for one another")


class Turns:
    """Whose turn it is: the host's, the dispatcher's or the device's. Before and after each operation, it is drawn."""

    def __init__(self, device: Device, draw: random.Random) -> None:
        self._device = device
        self._draw = draw.random
        # From a device that does nothing until the host waits to one that does everything at once.
        self._device_pace = draw.choice((0.0, 0.1, 0.3, 0.6, 0.9))
        self._dispatcher_pace = draw.choice((0.05, 0.2, 0.5))
        self._lock = threading.Lock()
        self._dispatcher: greenlet | None = None
        self._ready: Callable[[], bool] = _always

    def start(self, work: Callable[[], None], lock: threading.Lock) -> None:
        """`work` is what the dispatcher does. While `lock` is held, the host and it take no turns."""
        self._lock = lock
        self._dispatcher = greenlet(work)

    @property
    def dispatching(self) -> bool:
        """Whether the caller is the dispatcher."""
        return getcurrent() is self._dispatcher

    def pause(self) -> None:
        """Between two operations of the host or of the dispatcher."""
        draw = self._draw
        while draw() < self._device_pace and self._device.step():
            pass
        if self._lock.locked():
            return
        if getcurrent() is self._dispatcher:
            if draw() < self._dispatcher_pace:
                self._let_host()
        elif draw() < self._dispatcher_pace:
            self._let_dispatcher()

    def wait(self, ready: Callable[[], bool]) -> None:
        """The caller, host or dispatcher, does nothing until `ready`. Raises Deadlock where that never is."""
        if getcurrent() is self._dispatcher:
            self._ready = ready
            while True:
                self._let_host()
                if ready():
                    break
            self._ready = _always
            return
        idle = 0
        while not ready():
            if self._draw() < 0.5:
                self._let_dispatcher()
            idle = 0 if self._device.step() else idle + 1
            if idle > MAX_IDLE_TURNS:
                raise Deadlock("the host waits for ever")

    def wait_for_the_end(self) -> None:
        """The host does nothing until the dispatcher has ended."""
        dispatcher = self._dispatcher
        assert dispatcher is not None
        self.wait(lambda: bool(dispatcher.dead))

    def _let_dispatcher(self) -> None:
        dispatcher = self._dispatcher
        if dispatcher is not None and not dispatcher.dead and not self._lock.locked() and self._ready():
            dispatcher.switch()

    def _let_host(self) -> None:
        assert self._dispatcher is not None
        host = self._dispatcher.parent
        assert host is not None
        host.switch()


def _always() -> bool:
    return True


def _nothing() -> None:
    pass


class StandInStreams(Streams):
    """The streams of a `Device`. A copy writes the halves of a record in two steps, and 0 for the second one before."""

    def __init__(self, device: Device, turns: Turns) -> None:
        self.copies = 0
        """Copies that were queued."""
        self._device = device
        self._turns = turns

    def staging(self, nbytes: int) -> HostBuffer:
        """See the base class."""
        return HostBuffer(nbytes, pin=False)

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Any) -> tuple[Event, Event]:
        """See the base class."""
        self._turns.pause()
        self.copies += 1
        device, start, end = self._device, Event(), Event()
        to, given, address = target.numpy(), source.numpy(), target.data_ptr()
        half = len(to) // 2

        def begin() -> None:
            device.passes(start)
            device.writing.add(address)
            to[:half] = given[:half]
            to[half:] = 0

        def complete() -> None:
            to[half:] = given[half:]
            device.writing.discard(address)
            device.passes(end)

        device.queue(device.copies, begin, after)
        device.queue(device.copies, complete)
        self._turns.pause()
        return start, end

    def mark(self) -> Event:
        """See the base class."""
        self._turns.pause()
        return self._device.record(self._device.compute)

    def compute_after(self, event: Any) -> tuple[Event, Event] | None:
        """See the base class."""
        self._turns.pause()
        if event.passed:
            return None
        lane = self._device.compute
        return self._device.record(lane), self._device.record(lane, event)

    def passed(self, event: Any) -> bool:
        """See the base class."""
        self._turns.pause()
        return bool(event.passed)

    def block(self, event: Any) -> None:
        """See the base class."""
        self._turns.wait(lambda: bool(event.passed))

    def seconds(self, start: Any, end: Any) -> float:
        """See the base class: steps."""
        assert start.passed
        assert end.passed
        return float(end.at - start.at)


class StandInReads(HostReads):
    """Reads of a `Device`: values are what they are when the lane of compute comes to them."""

    def __init__(self, device: Device, turns: Turns) -> None:
        self.device = device
        self.turns = turns
        self.before_wait: Callable[[], None] = _nothing
        """Called before the host waits for a read; what it raises ends the wait."""

    def start(self, values: Sequence[torch.Tensor]) -> HostRead:
        """See the base class."""
        self.turns.pause()
        read = StandInRead(self)
        device = self.device
        device.queue(device.compute, lambda: read.values.extend(value.clone() for value in values))
        read.event = device.record(device.compute)
        return read


class StandInRead(HostRead):
    """A read of `StandInReads`."""

    def __init__(self, reads: StandInReads) -> None:
        self._reads = reads
        self.values: list[torch.Tensor] = []
        self.event = Event()

    def arrived(self) -> bool:
        """See the base class."""
        self._reads.turns.pause()
        return self.event.passed

    def wait(self) -> list[torch.Tensor]:
        """See the base class."""
        self._reads.turns.pause()
        self._reads.before_wait()
        self._reads.turns.wait(lambda: self.event.passed)
        return self.values


class TurnCondition(threading.Condition):
    """A condition for which one of host and dispatcher waits, and of which the other one tells it."""

    def __init__(self, lock: threading.Lock, turns: Turns) -> None:
        super().__init__(lock)
        self._held, self._turns, self._told = lock, turns, False

    def wait(self, timeout: float | None = None) -> bool:
        """See the base class. A time-out of the dispatcher may be over at any moment.

        The host's is for what other threads want of it, and here are none: it waits until it is told, or for ever.
        """
        self._told = False
        self._held.release()
        self._turns.wait(_always if timeout is not None and self._turns.dispatching else lambda: self._told)
        assert self._held.acquire(blocking=False), "a turn was given while the lock was held"
        return self._told

    def notify(self, n: int = 1) -> None:
        """See the base class."""
        self._told = True

    def notify_all(self) -> None:
        """See the base class."""
        self._told = True


class TurnThread(threading.Thread):
    """The dispatcher, for whoever waits for its end."""

    def __init__(self, turns: Turns) -> None:
        super().__init__()
        self._turns = turns

    def join(self, timeout: float | None = None) -> None:
        """See the base class."""
        self._turns.wait_for_the_end()


class Readers(ReaderThreads):
    """Reads what it is given at once. The dispatcher waits for all reads of a record: it could not tell."""

    def submit(self, function: Callable[[], None]) -> Future[None]:
        """See the base class."""
        future: Future[None] = Future()
        try:
            function()
            future.set_result(None)
        except Exception as error:
            future.set_exception(error)
        return future


class TurnLink(CudaLink):
    """The link, whose dispatcher takes turns with the host instead of running on a thread of its own."""

    def __init__(self, store: ExpertStore, streams: Streams, staging: int, turns: Turns) -> None:
        self._turns = turns
        super().__init__(store, streams, staging, 1)

    def _start_dispatching(self) -> threading.Thread:
        self._readers = Readers(0, "none")
        self._work, self._issued = (TurnCondition(self._lock, self._turns) for _ in range(2))
        self._turns.start(self._dispatch, self._lock)
        return TurnThread(self._turns)
