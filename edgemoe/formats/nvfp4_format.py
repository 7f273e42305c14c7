"""NVFP4: 4-bit floats in groups of 16 with an 8-bit float each, and one factor for the matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from edgemoe.cache.record import Part
from edgemoe.formats.codes import e2m1, nibbles, spread
from edgemoe.formats.weight_format import WeightFormat

GROUP = 16


@dataclass(frozen=True)
class Nvfp4Format(WeightFormat):
    """Codes uint8 [rows, columns / 2] with the lower one first, scales e4m3 [rows, groups], and a float32."""

    divides: bool
    """Whether scales are divided by the factor (compressed-tensors' global scale) or multiplied (modelopt's)."""

    @property
    def name(self) -> str:
        """See the base class."""
        return "nvfp4"

    @property
    def bits_per_weight(self) -> float:
        """See the base class."""
        return 4.0 + 8.0 / GROUP

    def parts(self, name: str, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """See the base class."""
        rows, columns = shape
        if columns % GROUP:
            raise ValueError(f"NVFP4 rows are a multiple of {GROUP}, not {columns}")
        return (
            Part(name, (rows, columns // 2), torch.uint8),
            Part(f"{name}.scale", (rows, columns // GROUP), torch.float8_e4m3fn),
            Part(f"{name}.factor", (1,), torch.float32),
        )

    def rows(self, views: Mapping[str, torch.Tensor], name: str, first: int, last: int) -> torch.Tensor:
        """See the base class."""
        values = e2m1(nibbles(views[name][first:last]))
        scales, factor = views[f"{name}.scale"][first:last].float(), views[f"{name}.factor"]
        scales = scales / factor if self.divides else scales * factor
        return values * spread(scales, GROUP, values.shape[1], 1)
