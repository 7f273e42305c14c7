"""Threads for kernels, and who has the cores: these threads or PyTorch's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

WORTH_SPLITTING = 3 << 20
"""Bytes; less is read sooner by one thread than by waking another."""


class Workers:
    """Splits ranges over `threads` threads, the caller being one of them. The kernels release the GIL.

    Python threads rather than a parallel runtime: PyTorch brings its own OpenMP pool, and a second pool
    that spins for work beside it would cost more than it gives.
    """

    def __init__(self, threads: int) -> None:
        self.threads = max(1, threads)
        self._pool = ThreadPoolExecutor(self.threads - 1, "edgemoe-kernel") if self.threads > 1 else None

    def split(self, count: int, run: Callable[[int, int], None], *, nbytes: int) -> None:
        """Calls `run(first, last)` over parts of range(count) at once; one part when `nbytes` is little to read.

        Waking a thread costs about as much as reading a megabyte.
        """
        if self._pool is None or nbytes < WORTH_SPLITTING:
            run(0, count)
            return
        step = -(-count // self.threads)
        others = [self._pool.submit(run, first, min(first + step, count)) for first in range(step, count, step)]
        run(0, min(step, count))
        for other in others:
            other.result()

    def close(self) -> None:
        """Ends the threads. Idempotent."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Runs the block with `count` intra-operation threads and restores the caller's number afterwards."""
    before = torch.get_num_threads()
    if before == count:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def kernels_have_the_cores(workers: Workers) -> bool:
    """Whether PyTorch computes in one thread, so that the kernels' own may use the other cores."""
    return torch.get_num_threads() == 1 or workers.threads == 1
