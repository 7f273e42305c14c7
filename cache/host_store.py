"""All records in RAM, page-locked as far as the system lets, for a device that copies from it by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from edgemoe.cache.record import ExpertId
from edgemoe.cache.store import ExpertStore, Piece

SLAB_NBYTES = 256 << 20
"""Memory is taken in slabs of about this size: few page-lock calls, and a refusal costs one slab, not all."""


class HostStore(ExpertStore):
    """A copy of another store's records in RAM.

    `pinned_limit` caps the page-locked bytes; slabs beyond it, and every slab after the system once
    refused to lock one, are ordinary memory. With `pin` false nothing is locked, which is how it runs
    where there is no CUDA.
    """

    def __init__(self, source: ExpertStore, pinned_limit: int, *, pin: bool) -> None:
        self.layouts = source.layouts
        self.experts = source.experts
        self._source = source
        self._records: dict[ExpertId, tuple[torch.Tensor, bool]] = {}
        self.pinned_nbytes = 0
        """Bytes that are page-locked."""
        self._allocate(pinned_limit if pin else 0)

    def fill(self, threads: int, on_progress: Callable[[int, int], None]) -> None:
        """Reads every record from the source with `threads` reads in flight; reports (bytes done, bytes in all)."""
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
        """The record, uint8 [record bytes], and whether it is page-locked. Valid until `close`."""
        return self._records[expert]

    def pieces(self, expert: ExpertId, slot: torch.Tensor) -> Sequence[Piece]:
        """See the base class."""
        record, _ = self._records[expert]

        def copy() -> None:
            slot[: len(record)].copy_(record)

        return [(len(record), copy)]

    def close(self) -> None:
        """See the base class. The source stays open."""
        self._records.clear()

    def _allocate(self, pinned_limit: int) -> None:
        waiting = [ExpertId(layer, index) for layer, count in enumerate(self.experts) for index in range(count)]
        refused = False
        while waiting:
            first = self.record_nbytes(waiting[0])
            count = max(1, min(len(waiting), SLAB_NBYTES // first))
            nbytes = sum(self.record_nbytes(expert) for expert in waiting[:count])
            locked = not refused and self.pinned_nbytes + nbytes <= pinned_limit
            slab, locked_now = _slab(nbytes, locked)
            refused = refused or (locked and not locked_now)
            self.pinned_nbytes += nbytes if locked_now else 0
            at = 0
            for expert in waiting[:count]:
                size = self.record_nbytes(expert)
                self._records[expert] = slab[at : at + size], locked_now
                at += size
            waiting = waiting[count:]


def _slab(nbytes: int, locked: bool) -> tuple[torch.Tensor, bool]:
    """Memory for records, page-locked if asked for and granted."""
    if locked:
        try:
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True), True
        except RuntimeError:
            # The system's limit on locked memory: laptops, Windows and WSL have low ones.
            pass
    return torch.empty(nbytes, dtype=torch.uint8), False
