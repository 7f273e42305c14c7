"""What a weight format declares: the parts of a matrix in a record, and the plain arithmetic that reads them back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch

from edgemoe.cache.record import Part


class WeightFormat(ABC):
    """How the weights of a matrix are stored. Immutable; knows no files and no devices."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The format's short name, such as "bf16"."""

    @property
    @abstractmethod
    def bits_per_weight(self) -> float:
        """Bits that a weight takes, its share of scales included; padding between parts is not."""

    @abstractmethod
    def parts(self, name: str, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """The parts of a record that hold one expert's matrix `name` of `shape`.

        The first one is called `name`, the others `name` with a suffix. Raises ValueError for a shape that the format
        cannot hold.
        """

    @abstractmethod
    def rows(self, views: Mapping[str, torch.Tensor], name: str, first: int, last: int) -> torch.Tensor:
        """The rows `first` ≤ r < `last` of the matrix `name` in a float dtype, on the device of `views`.

        The plain form that kernels are compared with; by rows, so that no whole matrix is widened at a time. `first` is
        a multiple of `row_multiple`. Packed formats give float32. The result may share the record's memory (see
        `RecordLayout.views`): it is valid as long as the record stays in its slot, and must not be written to.
        """

    def height(self, views: Mapping[str, torch.Tensor], name: str) -> int:
        """The number of rows of the matrix `name`."""
        return views[name].shape[0]

    def dequantize(self, views: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
        """The whole matrix, as `rows` gives it."""
        return self.rows(views, name, 0, self.height(views, name))

    row_multiple = 1
    """Rows that are packed together: `rows` begins at a multiple of it."""


class MakeableFormat(WeightFormat):
    """A format that edgemoe also makes of float weights; see `made`."""

    @abstractmethod
    def quantize(self, matrix: torch.Tensor) -> dict[str, torch.Tensor]:
        """The parts that hold `matrix`, float [rows, columns] on the CPU, by the suffixes of their names. Lossy."""
