"""Threads for kernels, and which threads have the cores: the kernels' or PyTorch's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch

MIN_SPLIT_NBYTES = 3 << 20
"""Bytes to read below which one thread is faster than two: waking a thread takes as long as reading a megabyte."""


class _Worker:
    """A thread that runs one piece of work after the other. Two locks hand it over, which is faster than a queue."""

    def __init__(self, name: str) -> None:
        self._begin, self._done = threading.Lock(), threading.Lock()
        self._begin.acquire()
        self._done.acquire()
        self._work: Callable[[], None] | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    def begin(self, work: Callable[[], None]) -> None:
        """Has `work` done; `join` must follow before the next one."""
        self._work = work
        self._begin.release()

    def join(self) -> BaseException | None:
        """Waits for the work; what it raised."""
        self._done.acquire()
        error, self._error = self._error, None
        return error

    def close(self) -> None:
        """Ends the thread, which has no work."""
        self._work = None
        self._begin.release()
        self._thread.join()

    def _serve(self) -> None:
        while True:
            self._begin.acquire()
            work, self._work = self._work, None
            if work is None:
                return
            try:
                work()
            except BaseException as error:
                self._error = error
            del work
            self._done.release()


class KernelThreads:
    """Splits the rows of a kernel over threads, one of which is the caller. Kernels release the GIL.

    These are Python threads: PyTorch has its own OpenMP pool, and a second pool of threads that spin while they wait
    would take the cores from it.
    """

    def __init__(self, count: int) -> None:
        """`count` is the number of threads with the caller; below 1 it is 1."""
        self.count = max(1, count)
        self._workers = [_Worker(f"edgemoe-kernel_{number}") for number in range(self.count - 1)]

    def split(self, rows: int, run: Callable[[int, int], None], *, nbytes: int) -> None:
        """Calls `run(first, last)` for consecutive parts of range(rows), one part per thread, and waits for all.

        `nbytes` is what the whole call reads: below `MIN_SPLIT_NBYTES` the caller runs it alone. Raises what `run`
        raises, once no thread runs it any more.
        """
        if not self._workers or nbytes < MIN_SPLIT_NBYTES:
            run(0, rows)
            return
        step = -(-rows // self.count)
        begun = []
        errors: list[BaseException | None] = []
        try:
            for worker, first in zip(self._workers, range(step, rows, step), strict=False):
                worker.begin(partial(run, first, min(first + step, rows)))
                begun.append(worker)
            run(0, min(step, rows))
        finally:
            errors += [worker.join() for worker in begun]
        for error in errors:
            if error is not None:
                raise error

    def close(self) -> None:
        """Ends the threads. Idempotent."""
        for worker in self._workers:
            worker.close()
        self._workers = []


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Runs the block with `count` of PyTorch's intra-operation threads, then restores the previous number."""
    before = torch.get_num_threads()
    if before == count:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def at_least_torch_threads(count: int) -> AbstractContextManager[None]:
    """`torch_threads` with `count`, or with as many as there are now if these are more."""
    return torch_threads(max(count, torch.get_num_threads()))


def kernels_have_the_cores(threads: KernelThreads) -> bool:
    """Whether kernels may run now: PyTorch uses one thread and leaves the other cores, or kernels need no others."""
    return torch.get_num_threads() == 1 or threads.count == 1
