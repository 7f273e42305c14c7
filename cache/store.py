"""Where all records are. A store says how a record reaches a slot; a link decides when and with what priority."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch

from edgemoe.cache.record import ExpertId, RecordLayout

Piece = tuple[int, Callable[[], None]]
"""One independent part of filling a slot: its bytes, and the call that moves them. Pieces may run in any
order and on any thread; the record is whole when all have returned."""


class ExpertStore(ABC):
    """All records of a checkpoint, read-only."""

    layouts: tuple[RecordLayout, ...]
    """One layout a MoE layer, in the order of the layers."""
    experts: tuple[int, ...]
    """Experts in each MoE layer."""

    @abstractmethod
    def pieces(self, expert: ExpertId, slot: torch.Tensor) -> Sequence[Piece]:
        """What must run to fill `slot` with the record of `expert`.

        `slot` is uint8 [at least `layouts[expert.layer].nbytes`]; the pieces write it. They raise OSError
        when the record cannot be read.
        """

    @abstractmethod
    def close(self) -> None:
        """Gives back files and memory. Idempotent; no piece may run afterwards."""

    @property
    def slot_nbytes(self) -> int:
        """Bytes of the largest record: what a slot must hold."""
        return max(layout.nbytes for layout in self.layouts)

    @property
    def nbytes(self) -> int:
        """Bytes of all records."""
        return sum(layout.nbytes * count for layout, count in zip(self.layouts, self.experts, strict=True))

    def record_nbytes(self, expert: ExpertId) -> int:
        """Bytes that cross the link for `expert`."""
        return self.layouts[expert.layer].nbytes
