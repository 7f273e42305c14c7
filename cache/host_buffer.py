"""Host memory of an exact size, page-locked where the system allows, and given back when it is closed."""

from __future__ import annotations

import mmap
import sys

import torch

from edgemoe.cache import accelerator


class HostBuffer:
    """An anonymous memory map, which a CUDA device can copy from asynchronously once it is page-locked.

    PyTorch's own page-locked memory is rounded up to powers of two, and stays with PyTorch until the process ends.
    """

    def __init__(self, nbytes: int, *, pin: bool) -> None:
        """With `pin` the pages are locked, unless the system refuses."""
        self._map: mmap.mmap | None = private_map(max(1, nbytes))
        self.memory = torch.frombuffer(self._map, dtype=torch.uint8)[:nbytes]
        """uint8 [nbytes], of zeros at first; valid until `close`."""
        self.locked = pin and accelerator.lock_host(self.memory)
        """Whether the pages are locked."""

    def close(self) -> None:
        """Unlocks the pages and frees them. Idempotent. No copy may be in flight, and no tensor of it may be used."""
        if self.locked:
            accelerator.unlock_host(self.memory)
            self.locked = False
        self.memory = torch.empty(0, dtype=torch.uint8)
        self._map = None


MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0
"""Of mmap(2); Python names it from 3.13 on."""
HUGE_PAGE = 2 << 20
"""Bytes of a huge page on x86 and ARM, with pages of 4 KiB."""


def memory_of_its_own(nbytes: int) -> torch.Tensor:
    """uint8 [nbytes], of zeros, freed with the last tensor that shares it; in huge pages where the system has them.

    For weights, which every token reads. What does not fill a huge page lies in small ones, so that none is wasted.
    """
    if nbytes < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(nbytes, dtype=torch.uint8)
    made = mmap.mmap(-1, nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory = torch.frombuffer(made, dtype=torch.uint8)
    first = -memory.data_ptr() % HUGE_PAGE
    made.madvise(mmap.MADV_HUGEPAGE, first, nbytes // HUGE_PAGE * HUGE_PAGE)
    return memory[first : first + nbytes]


def private_map(nbytes: int) -> mmap.mmap:
    """An anonymous private map with huge pages where the system has them.

    Locking and reading 4 KiB pages costs TLB misses. The system gives no huge pages to shared maps, which are Python's
    default.
    """
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, nbytes)
    made = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        made.madvise(mmap.MADV_HUGEPAGE)
    return made


def reserved_map(nbytes: int) -> mmap.mmap:
    """As `private_map`, for addresses of which only some will be used: the system sets no memory aside for them.

    Raises OSError where it does not allow that many.
    """
    if not hasattr(mmap, "MAP_PRIVATE") or not hasattr(mmap, "MADV_DONTNEED"):
        raise OSError("this system cannot reserve addresses")
    made = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        made.madvise(mmap.MADV_HUGEPAGE)
    return made
