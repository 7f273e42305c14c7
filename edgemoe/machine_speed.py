"""Measures a machine's ceilings: how fast its memory is read, how fast it multiplies, how fast it copies."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

TRIES = 5
"""Of which the fastest counts: what slows a try down is another program."""
MOST_NBYTES = 1 << 30
"""Of memory that is read, enough to be past any cache."""
ROWS = 512
"""Rows of the product, enough for arithmetic to bound it."""


def memory_speed(memory: torch.Tensor) -> float:
    """Bytes a second at which `memory`, any contiguous uint8 tensor, is read and summed up."""
    values = memory.flatten()[: min(memory.nbytes, MOST_NBYTES) // 8 * 8].view(torch.int64)
    return values.nbytes / _fastest(lambda: values.sum(), memory.device)


def product_speed(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations a second of a product with a weight matrix of [rows, columns]."""
    weight = torch.ones(rows, columns, dtype=dtype, device=device)
    x = torch.ones(ROWS, columns, dtype=dtype, device=device)
    return 2 * ROWS * rows * columns / _fastest(lambda: torch.nn.functional.linear(x, weight), device)


def copy_speed(nbytes: int, device: torch.device) -> float:
    """Bytes a second at which a record of `nbytes` is copied from RAM to `device`."""
    here = torch.ones(nbytes, dtype=torch.uint8)
    there = torch.empty(nbytes, dtype=torch.uint8, device=device)
    return nbytes / _fastest(lambda: there.copy_(here), device)


def _fastest(action: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest try, the device's own work included."""

    def tried() -> float:
        started = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    tried()
    return max(1e-9, min(tried() for _ in range(TRIES)))
