"""Threads for kernels, and which threads have the cores: the kernels' or PyTorch's."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from edgemoe.kernels.cpu.program import Mailbox, Program, Step

MIN_SPLIT_NBYTES = 1 << 20
"""Bytes to read below which the caller runs a program alone: it would be done before another thread has woken."""


class KernelThreads:
    """Runs kernels on several threads, one of which is the caller, without the GIL. One program runs at a time.

    PyTorch has its own OpenMP pool, whose threads spin while they wait. These sleep.
    """

    def __init__(self, count: int) -> None:
        """`count` is the number of threads with the caller; below 1 it is 1."""
        self.count = max(1, count)
        self._mailboxes: list[Mailbox] = []
        self._threads: list[threading.Thread] = []
        self._scratch = np.empty(0, np.uint8)

    def run(self, steps: Sequence[Step], *, alone: bool = False) -> None:
        """Runs `steps`, of which there is at least one, one after the other.

        On all threads, or by the caller `alone`, as if they read less than `MIN_SPLIT_NBYTES`.
        """
        self.program(steps, alone=alone).run()

    def program(self, steps: Sequence[Step], *, alone: bool = False) -> Program:
        """What `run` runs, for more than one time. Threads that `close` has ended take no part in it."""
        # Imported late: importing numba is slow.
        from edgemoe.kernels.cpu.program import Program

        if alone or self.count == 1 or sum(step.nbytes for step in steps) < MIN_SPLIT_NBYTES:
            return Program(steps, (), self._memory)
        if not self._threads:
            self._start()
        return Program(steps, self._mailboxes, self._memory)

    def _memory(self, nbytes: int) -> Any:
        """What programs work in, of at least `nbytes`: the same for all, as one runs at a time."""
        if len(self._scratch) < nbytes:
            self._scratch = np.empty(nbytes, np.uint8)
        return self._scratch

    def close(self) -> None:
        """Ends the threads. Idempotent."""
        for mailbox in self._mailboxes:
            mailbox.close()
        for thread in self._threads:
            thread.join()
        self._mailboxes, self._threads = [], []

    def _start(self) -> None:
        from edgemoe.kernels.cpu.program import Mailbox

        self._mailboxes = [Mailbox(number) for number in range(1, self.count)]
        for number, mailbox in enumerate(self._mailboxes):
            name = f"edgemoe-kernel_{number}"
            self._threads.append(threading.Thread(target=mailbox.serve, name=name, daemon=True))
            self._threads[-1].start()


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
