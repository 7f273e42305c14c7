"""Weights stored as floats: bf16, fp16 and fp32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from edgemoe.cache.record import Part
from edgemoe.formats.weight_format import WeightFormat

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
"""The dtypes of this format, and what they are called."""


@dataclass(frozen=True)
class FloatFormat(WeightFormat):
    """One part per matrix, of one of the dtypes in `NAMES`."""

    dtype: torch.dtype

    @property
    def name(self) -> str:
        """See the base class."""
        return NAMES[self.dtype]

    @property
    def bits_per_weight(self) -> float:
        """See the base class."""
        return 8.0 * self.dtype.itemsize

    def parts(self, name: str, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """See the base class."""
        return (Part(name, shape, self.dtype),)

    def dequantize(self, views: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
        """See the base class: the part itself, which shares the record's memory."""
        return views[name]

    def rows(self, views: Mapping[str, torch.Tensor], name: str, first: int, last: int) -> torch.Tensor:
        """See the base class: the part's own, which share the record's memory."""
        return views[name][first:last]
