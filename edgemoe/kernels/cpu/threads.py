"""Threads for kernels, and which threads have the cores: the kernels' or PyTorch's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

MIN_SPLIT_NBYTES = 3 << 20
"""Bytes to read below which one thread is faster than two: waking a thread takes as long as reading a megabyte."""


class KernelThreads:
    """Splits the rows of a kernel over threads, one of which is the caller. Kernels release the GIL.

    These are Python threads: PyTorch has its own OpenMP pool, and a second pool of threads that spin while they wait
    would take the cores from it.
    """

    def __init__(self, count: int) -> None:
        """`count` is the number of threads with the caller; below 1 it is 1."""
        self.count = max(1, count)
        self._pool = ThreadPoolExecutor(self.count - 1, "edgemoe-kernel") if self.count > 1 else None

    def split(self, rows: int, run: Callable[[int, int], None], *, nbytes: int) -> None:
        """Calls `run(first, last)` for consecutive parts of range(rows), one part per thread, and waits for all.

        `nbytes` is what the whole call reads: below `MIN_SPLIT_NBYTES` the caller runs it alone. Raises what `run`
        raises.
        """
        if self._pool is None or nbytes < MIN_SPLIT_NBYTES:
            run(0, rows)
            return
        step = -(-rows // self.count)
        others = [self._pool.submit(run, first, min(first + step, rows)) for first in range(step, rows, step)]
        run(0, min(step, rows))
        for other in others:
            other.result()

    def close(self) -> None:
        """Ends the threads. Idempotent."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


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


def kernels_have_the_cores(threads: KernelThreads) -> bool:
    """Whether kernels may run now: PyTorch uses one thread and leaves the other cores, or kernels need no others."""
    return torch.get_num_threads() == 1 or threads.count == 1
