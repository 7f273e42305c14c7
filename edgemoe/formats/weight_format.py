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
        """The parts of a record that hold one expert's matrix `name` of `shape`."""

    @abstractmethod
    def dequantize(self, views: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
        """The matrix `name` in a float dtype, on the device of `views` (see `RecordLayout.views`).

        The plain form that kernels are compared with. The result may share the record's memory: it is valid as long
        as the record stays in its slot, and must not be written to.
        """
