"""bitsandbytes' formats: 4-bit codes of a table in blocks of the flattened matrix, and 8-bit rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from edgemoe.cache.record import Part
from edgemoe.formats.codes import nibbles
from edgemoe.formats.weight_format import MakeableFormat
from edgemoe.quiet import quiet_logger


@dataclass(frozen=True)
class BnbFourBitFormat(MakeableFormat):
    """nf4 and fp4: codes uint8 [values / 2, 1] with the higher one first, a table of 16, and a maximum for each block.

    The maxima are float32: those that a checkpoint has packed in their turn are read back first.
    """

    kind: str
    """`nf4` or `fp4`."""
    columns: int
    block: int = 64

    @property
    def name(self) -> str:
        """See the base class."""
        return self.kind

    @property
    def bits_per_weight(self) -> float:
        """See the base class."""
        return 4.0 + 32.0 / self.block

    def parts(self, name: str, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """See the base class."""
        rows, columns = shape
        values = rows * columns
        if columns != self.columns or values % 2:
            raise ValueError(f"the checkpoint says {self.columns} columns, and its family {columns}")
        return (
            Part(name, (values // 2, 1), torch.uint8),
            Part(f"{name}.absmax", (-(-values // self.block),), torch.float32),
            Part(f"{name}.quant_map", (16,), torch.float32),
        )

    @property
    def row_multiple(self) -> int:  # type: ignore[override]
        """See the base class: two rows of an odd length share a byte."""
        return 1 + self.columns % 2

    def height(self, views: Mapping[str, torch.Tensor], name: str) -> int:
        """See the base class."""
        return 2 * views[name].numel() // self.columns

    def rows(self, views: Mapping[str, torch.Tensor], name: str, first: int, last: int) -> torch.Tensor:
        """See the base class."""
        start, stop = first * self.columns, last * self.columns
        packed = views[name].flatten()[start // 2 : -(-stop // 2)]
        codes = nibbles(packed, low_first=False)[: stop - start]
        blocks = torch.arange(start, stop, device=codes.device) // self.block
        values = views[f"{name}.quant_map"][codes.long()] * views[f"{name}.absmax"][blocks]
        return values.view(-1, self.columns)

    def quantize(self, matrix: torch.Tensor) -> dict[str, torch.Tensor]:
        """See the base class. By bitsandbytes."""
        functional = bitsandbytes_functional()
        values = matrix.float().contiguous()
        codes, state = functional.quantize_4bit(values, blocksize=self.block, quant_type=self.kind)
        return {"": codes, ".absmax": state.absmax, ".quant_map": state.code.to(torch.float32)}


@dataclass(frozen=True)
class BnbInt8Format(MakeableFormat):
    """Values int8 [rows, columns], and the largest magnitude of each row, float32 [rows], which stands for 127."""

    @property
    def name(self) -> str:
        """See the base class."""
        return "int8"

    @property
    def bits_per_weight(self) -> float:
        """See the base class."""
        return 8.0

    def parts(self, name: str, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """See the base class."""
        return Part(name, shape, torch.int8), Part(f"{name}.scb", shape[:1], torch.float32)

    def rows(self, views: Mapping[str, torch.Tensor], name: str, first: int, last: int) -> torch.Tensor:
        """See the base class."""
        # bitsandbytes multiplies by the rounded reciprocal of 127.
        return views[name][first:last] * views[f"{name}.scb"][first:last, None] * 7.874015718698502e-3

    def quantize(self, matrix: torch.Tensor) -> dict[str, torch.Tensor]:
        """See the base class. By bitsandbytes."""
        codes, largest, _ = bitsandbytes_functional().int8_vectorwise_quant(matrix.float().contiguous())
        return {"": codes, ".scb": largest}


def bitsandbytes_functional() -> Any:
    """The module `bitsandbytes.functional`. Imported when it is first needed: that takes a second."""
    # It warns of kernels that are not needed here.
    with quiet_logger("bitsandbytes.backends.cpu.ops"):
        import bitsandbytes.functional as functional
    return functional
