"""A stand-in for PyTorch's caching allocator of CUDA memory: its rounding, its segments, and what it keeps.

After `CUDACachingAllocator.cpp` with its default settings, for one stream: requests are rounded up to 512 bytes. Those
of up to 1 MiB lie in segments of 2 MiB, those below 10 MiB in segments of 20 MiB, larger ones in segments of their own
size rounded up to 2 MiB. The smallest free block that fits is taken, and split where enough of it is left. A segment is
given back only when it is wholly free, and memory is short or `empty` is called.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

BLOCK, SMALL, SMALL_SEGMENT = 512, 1 << 20, 2 << 20
LARGE_SEGMENT, MIN_OWN_SEGMENT, SEGMENT_MULTIPLE = 20 << 20, 10 << 20, 2 << 20


@dataclass(eq=False)
class _Block:
    """A part of a segment; its neighbours lie before and after it in `segment`."""

    nbytes: int
    segment: list[_Block]
    small: bool
    free: bool = True


class CachingAllocator:
    """The memory of one device of `capacity` bytes."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.allocated = 0
        """Bytes in use, rounded."""
        self.reserved = 0
        """Bytes of all segments: what other programs see as taken."""
        self.held = 0
        """Bytes of the segments that are in use, with the gaps in them: what cannot be given back."""
        self.peak_reserved = self.peak_allocated = self.peak_held = 0
        self._segments: list[list[_Block]] = []
        self._used: dict[int, _Block] = {}

    def take(self, key: int, nbytes: int) -> None:
        """Allocates `nbytes` under `key`, which is new. Raises torch.OutOfMemoryError where they do not fit."""
        if nbytes == 0:
            return
        size = max(BLOCK, -(-nbytes // BLOCK) * BLOCK)
        small = size <= SMALL
        fitting = [block for segment in self._segments for block in segment if block.free and block.small == small]
        block = min((each for each in fitting if each.nbytes >= size), key=lambda each: each.nbytes, default=None)
        block = block or self._new_segment(size, small)
        if len(block.segment) == 1:
            self.held += block.nbytes
            self.peak_held = max(self.peak_held, self.held)
        left = block.nbytes - size
        if left >= BLOCK if small else left > SMALL:
            block.segment.insert(block.segment.index(block) + 1, _Block(left, block.segment, small))
            block.nbytes = size
        block.free = False
        self.allocated += block.nbytes
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        self._used[key] = block

    def give(self, key: int) -> None:
        """Frees what was allocated under `key`; nothing where that was empty."""
        block = self._used.pop(key, None)
        if block is None:
            return
        self.allocated -= block.nbytes
        block.free = True
        segment = block.segment
        place = segment.index(block)
        for first in (place, place - 1):
            if first >= 0 and first + 1 < len(segment) and segment[first].free and segment[first + 1].free:
                segment[first].nbytes += segment.pop(first + 1).nbytes
        if len(segment) == 1:
            self.held -= segment[0].nbytes

    def empty(self) -> None:
        """Gives back the segments that are wholly free."""
        for segment in [each for each in self._segments if len(each) == 1 and each[0].free]:
            self._segments.remove(segment)
            self.reserved -= segment[0].nbytes

    def _new_segment(self, size: int, small: bool) -> _Block:
        nbytes = SMALL_SEGMENT if small else LARGE_SEGMENT
        if size >= MIN_OWN_SEGMENT:
            nbytes = -(-size // SEGMENT_MULTIPLE) * SEGMENT_MULTIPLE
        if self.reserved + nbytes > self.capacity:
            self.empty()
        if self.reserved + nbytes > self.capacity:
            raise torch.OutOfMemoryError(f"{nbytes} bytes do not fit beside {self.reserved} of {self.capacity}")
        segment: list[_Block] = []
        segment.append(_Block(nbytes, segment, small))
        self._segments.append(segment)
        self.reserved += nbytes
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return segment[0]
