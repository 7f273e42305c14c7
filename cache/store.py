"""The source of all records. A store knows how to copy a record into a slot; a link decides when."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch

from edgemoe.cache.record import ExpertId, RecordLayout

Piece = tuple[int, Callable[[], None]]
"""One part of a record's copy: its size in bytes, and the function that copies it. Pieces may run in any order and on
any thread. The record is complete when all have returned."""


class ExpertStore(ABC):
    """All records of a checkpoint, read-only."""

    layouts: tuple[RecordLayout, ...]
    """The record layout of each MoE layer."""
    experts: tuple[int, ...]
    """The number of experts of each MoE layer."""

    @abstractmethod
    def pieces(self, expert: ExpertId, slot: torch.Tensor) -> Sequence[Piece]:
        """The pieces that copy the record of `expert` into `slot`, uint8 [at least `layouts[expert.layer].nbytes`].

        A piece writes its part of `slot` when it is called. It raises OSError when the record cannot be read.
        """

    @abstractmethod
    def close(self) -> None:
        """Closes files and frees memory. Idempotent. No piece may run afterwards."""

    @property
    def slot_nbytes(self) -> int:
        """Bytes of the largest record, which is the size of a slot that holds any record."""
        return max(layout.nbytes for layout in self.layouts)

    @property
    def nbytes(self) -> int:
        """Bytes of all records."""
        return sum(layout.nbytes * count for layout, count in zip(self.layouts, self.experts, strict=True))

    @property
    def mean_nbytes(self) -> int:
        """Mean bytes of a record."""
        return round(self.nbytes / sum(self.experts))

    def record_nbytes(self, expert: ExpertId) -> int:
        """Bytes of the record of `expert`."""
        return self.layouts[expert.layer].nbytes
