"""MXFP4 as gpt-oss publishes it: 4-bit floats in groups of 32, each with a power of two."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from edgemoe.cache.record import Part
from edgemoe.formats.codes import e2m1, nibbles
from edgemoe.formats.weight_format import WeightFormat

GROUP = 32
BIAS = 127
"""Of the exponents, which are bytes."""


@dataclass(frozen=True)
class Mxfp4Format(WeightFormat):
    """Blocks uint8 [rows, groups, 16], two codes a byte, the lower one first, and exponents uint8 [rows, groups]."""

    @property
    def name(self) -> str:
        """See the base class."""
        return "mxfp4"

    @property
    def bits_per_weight(self) -> float:
        """See the base class."""
        return 4.0 + 8.0 / GROUP

    def parts(self, name: str, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """See the base class."""
        rows, columns = shape
        if columns % GROUP:
            raise ValueError(f"MXFP4 rows are a multiple of {GROUP}, not {columns}")
        groups = columns // GROUP
        return (
            Part(name, (rows, groups, GROUP // 2), torch.uint8),
            Part(f"{name}.scale", (rows, groups), torch.uint8),
        )

    def rows(self, views: Mapping[str, torch.Tensor], name: str, first: int, last: int) -> torch.Tensor:
        """See the base class."""
        values = e2m1(nibbles(views[name][first:last]))
        exponents = views[f"{name}.scale"][first:last].int() - BIAS
        return torch.ldexp(values, exponents.unsqueeze(-1)).flatten(1)
