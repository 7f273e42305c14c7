"""PyTorch's own threads, set for a stretch of work and given back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from edgemoe.workers import Workers


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
