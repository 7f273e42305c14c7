"""The packed types of GGUF: rows of blocks, each with its values and scales."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from edgemoe.cache.record import Part
from edgemoe.formats import gguf_blocks
from edgemoe.formats.weight_format import WeightFormat

BLOCKS = {
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34),
    "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
    "IQ4_NL": (32, 18), "IQ4_XS": (256, 136), "IQ3_S": (256, 110), "IQ3_XXS": (256, 98),
    "IQ2_XXS": (256, 66), "IQ2_XS": (256, 74), "IQ2_S": (256, 82), "MXFP4": (32, 17),
}  # fmt: skip
"""The values and the bytes of a block of each packed type that is read."""
IDS = {
    2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K",
    16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 39: "MXFP4",
}  # fmt: skip
"""Their numbers in files."""


@dataclass(frozen=True)
class GgufFormat(WeightFormat):
    """One part uint8 [rows, bytes of a row]; every row is whole blocks."""

    kind: str
    """A key of `BLOCKS`."""

    @property
    def name(self) -> str:
        """See the base class."""
        return self.kind

    @property
    def bits_per_weight(self) -> float:
        """See the base class."""
        values, nbytes = BLOCKS[self.kind]
        return 8.0 * nbytes / values

    def parts(self, name: str, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """See the base class."""
        rows, columns = shape
        values, nbytes = BLOCKS[self.kind]
        if columns % values:
            raise ValueError(f"rows of {self.kind} are a multiple of {values}, not {columns}")
        return (Part(name, (rows, columns // values * nbytes), torch.uint8),)

    def rows(self, views: Mapping[str, torch.Tensor], name: str, first: int, last: int) -> torch.Tensor:
        """See the base class."""
        packed = views[name][first:last]
        blocks = packed.reshape(-1, BLOCKS[self.kind][1])
        return gguf_blocks.VALUES[self.kind](blocks).view(last - first, -1)
