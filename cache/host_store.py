"""All records in RAM, page-locked as far as the system allows, so that a device can copy them asynchronously."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from edgemoe.cache.host_buffer import HostBuffer
from edgemoe.cache.record import ExpertId
from edgemoe.cache.store import ExpertStore, Piece

SLAB_NBYTES = 256 << 20
"""Bytes per allocation: few page-lock calls, and a refused call costs one slab only."""


class HostStore(ExpertStore):
    """A copy in RAM of the records of `source`, which stays open and is owned by the caller.

    At most `pinned_limit` bytes are page-locked. Slabs beyond the limit are pageable, as are all slabs after the system
    has refused to lock one. Without `pin`, as on a system without CUDA, all are pageable.
    """

    def __init__(self, source: ExpertStore, pinned_limit: int, *, pin: bool) -> None:
        self.layouts = source.layouts
        self.experts = source.experts
        self._source = source
        self._records: dict[ExpertId, tuple[torch.Tensor, bool]] = {}
        self._slabs: list[HostBuffer] = []
        self.pinned_nbytes = 0
        """Page-locked bytes."""
        self._allocate(pinned_limit if pin else 0)

    def fill(self, threads: int, on_progress: Callable[[int, int], None]) -> None:
        """Reads every record from the source, `threads` at a time. Calls `on_progress` with (bytes done, total bytes).

        To be called once, before any other method. Raises the source's OSError when a record cannot be read.
        """
        total, done = self.nbytes, 0

        def read(expert: ExpertId) -> int:
            for _, move in self._source.pieces(expert, self._records[expert][0]):
                move()
            return self.record_nbytes(expert)

        with ThreadPoolExecutor(threads, "edgemoe-fill") as pool:
            for nbytes in pool.map(read, self._records):
                done += nbytes
                on_progress(done, total)

    def record(self, expert: ExpertId) -> tuple[torch.Tensor, bool]:
        """The record, uint8 [record bytes], and whether it is page-locked. Valid until `close`; not to be written."""
        return self._records[expert]

    def pieces(self, expert: ExpertId, slot: torch.Tensor) -> Sequence[Piece]:
        """See the base class."""
        record, _ = self._records[expert]

        def copy() -> None:
            slot[: len(record)].copy_(record)

        return [(len(record), copy)]

    def close(self) -> None:
        """See the base class. Frees the memory; the source stays open. No copy of a record may be in flight."""
        self._records.clear()
        for slab in self._slabs:
            slab.close()
        self._slabs.clear()

    def _allocate(self, pinned_limit: int) -> None:
        left = [ExpertId(layer, index) for layer, count in enumerate(self.experts) for index in range(count)]
        refused = False
        while left:
            first = self.record_nbytes(left[0])
            count = max(1, min(len(left), SLAB_NBYTES // first))
            nbytes = sum(self.record_nbytes(expert) for expert in left[:count])
            pin = not refused and self.pinned_nbytes + nbytes <= pinned_limit
            slab = HostBuffer(nbytes, pin=pin)
            self._slabs.append(slab)
            refused = refused or (pin and not slab.locked)
            self.pinned_nbytes += nbytes if slab.locked else 0
            at = 0
            for expert in left[:count]:
                size = self.record_nbytes(expert)
                self._records[expert] = slab.memory[at : at + size], slab.locked
                at += size
            left = left[count:]
