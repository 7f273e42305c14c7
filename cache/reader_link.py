"""The link of a machine without a GPU: threads that read records into slots."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Sequence

import torch

from edgemoe.cache.link import CLOSE_SECONDS, Link, Priority, Throttle, Transfer, join_all, read_error
from edgemoe.cache.record import ExpertId
from edgemoe.cache.store import ExpertStore, Piece


class _Job(Transfer):
    """A transfer and its pieces that have not started."""

    def __init__(self, expert: ExpertId, slot: int, nbytes: int, priority: Priority, pieces: Sequence[Piece]) -> None:
        super().__init__(expert, slot, nbytes, priority)
        self.waiting = list(reversed(pieces))
        self.pieces = self.unfinished = len(pieces)


class ReaderLink(Link):
    """Reads records of `store` with `threads` threads, demand loads first.

    The threads take single pieces from a priority queue of jobs. So a demand load waits for at most one piece of a
    prefetch per thread.
    """

    def __init__(self, store: ExpertStore, threads: int, throttle: Throttle | None = None) -> None:
        self._store = store
        self._throttle = throttle
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._arrival = threading.Condition(self._lock)
        self._queue: list[tuple[Priority, int, _Job]] = []
        self._order = itertools.count()
        self._closed = False
        self._outstanding = 0
        self._busy_since = 0.0
        self._threads: list[threading.Thread] = []
        try:
            for number in range(threads):
                thread = threading.Thread(target=self._serve, name=f"edgemoe-read-{number}", daemon=True)
                thread.start()
                self._threads.append(thread)
        except BaseException:
            self.close()
            raise

    def start(self, expert: ExpertId, slot: int, memory: torch.Tensor, priority: Priority) -> Transfer:
        """See the base class."""
        error: BaseException | None = None
        try:
            pieces = self._store.pieces(expert, memory)
        except Exception as caught:
            # The caller has given the slot away: it learns of the failure where it waits for the transfer.
            pieces = []
            error = caught
        job = _Job(expert, slot, self._store.record_nbytes(expert), priority, pieces)
        with self._lock:
            if self._outstanding == 0:
                self._busy_since = time.perf_counter()
            self._outstanding += 1
            heapq.heappush(self._queue, (priority, next(self._order), job))
            self._work.notify(len(pieces))
        if error is not None:
            job.unfinished = 1
            self._finish(job, error)
        return job

    def promote(self, transfer: Transfer) -> None:
        """See the base class. Queues the job again; its old entry is dropped once its pieces have started."""
        assert isinstance(transfer, _Job)
        with self._lock:
            if transfer.priority is Priority.PREFETCH and transfer.waiting:
                heapq.heappush(self._queue, (Priority.DEMAND, next(self._order), transfer))
            transfer.priority = Priority.DEMAND

    def cancel(self, transfer: Transfer) -> bool:
        """See the base class."""
        assert isinstance(transfer, _Job)
        with self._lock:
            if transfer.done or len(transfer.waiting) < transfer.pieces:
                return False
            transfer.waiting.clear()
            self._ended()
            return True

    def wait_any(self, transfers: Sequence[Transfer], seconds: float | None = None) -> list[Transfer]:
        """See the base class."""
        end = None if seconds is None else time.monotonic() + seconds
        with self._lock:
            while True:
                arrived = [transfer for transfer in transfers if transfer.done]
                left = None if end is None else end - time.monotonic()
                if arrived or (left is not None and left <= 0):
                    return arrived
                self._arrival.wait(left)

    def released(self, slots: Sequence[int]) -> None:
        """See the base class. Nothing to do: on a CPU, work has ended when its call returns."""

    def close(self) -> None:
        """See the base class."""
        with self._lock:
            self._closed = True
            self._queue.clear()
            self._work.notify_all()
        join_all(self._threads, CLOSE_SECONDS)

    def _serve(self) -> None:
        while True:
            with self._lock:
                taken = self._take()
                while taken is None:
                    if self._closed:
                        return
                    self._work.wait()
                    taken = self._take()
            job, (nbytes, move) = taken
            error: BaseException | None = None
            try:
                arrival = self._throttle.book(nbytes) if self._throttle else 0.0
                move()
                Throttle.sleep_until(arrival)
            except BaseException as caught:
                # Whatever it is: a thread that ended would leave who waits without an answer.
                error = read_error(caught)
            self._finish(job, error)

    def _take(self) -> tuple[_Job, Piece] | None:
        """The next piece of the first job that has one; None when there is none. The lock is held."""
        while self._queue:
            job = self._queue[0][2]
            if job.waiting:
                return job, job.waiting.pop()
            heapq.heappop(self._queue)
        return None

    def _finish(self, job: _Job, error: BaseException | None) -> None:
        with self._lock:
            job.unfinished -= 1
            if error is not None:
                job.error = error
                job.unfinished -= len(job.waiting)
                job.waiting.clear()
            if job.unfinished == 0:
                # Those who look without the lock see the totals of what is done.
                if job.error is None:
                    self.bytes_moved += job.nbytes
                self._ended()
                job.done = True
                self._arrival.notify_all()

    def _ended(self) -> None:
        """A transfer ended: counts the time since the last one ended as busy. The lock is held."""
        now = time.perf_counter()
        self.busy_seconds += now - self._busy_since
        self._busy_since = now
        self._outstanding -= 1
