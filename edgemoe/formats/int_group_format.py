"""Integers of 4 or 8 bits in groups, in words of 32 bits, as compressed-tensors packs them (`pack-quantized`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional

from edgemoe.cache.record import Part
from edgemoe.formats.codes import fields, packed_fields, spread
from edgemoe.formats.weight_format import MakeableFormat


@dataclass(frozen=True)
class IntGroupFormat(MakeableFormat):
    """Words int32 [rows, columns * bits / 32] of values with an offset, scales [rows, groups], maybe zero points.

    Zero points are packed along the rows: int32 [rows * bits / 32, groups]. With `reordered` columns a part says to
    which group each one belongs, int32 [columns]. The product is rounded to the dtype of the scales, as in the library.
    """

    bits: int = 4
    group: int = 0
    """Columns of a group; 0 stands for the whole row."""
    scale_dtype: torch.dtype = torch.bfloat16
    has_zeros: bool = False
    reordered: bool = False

    @property
    def name(self) -> str:
        """See the base class."""
        return f"int{self.bits}"

    @property
    def bits_per_weight(self) -> float:
        """See the base class."""
        per_group = 8.0 * self.scale_dtype.itemsize + (self.bits if self.has_zeros else 0)
        return self.bits + (per_group / self.group if self.group else 0.0)

    @property
    def row_multiple(self) -> int:  # type: ignore[override]
        """See the base class: zero points of several rows share a word."""
        return 32 // self.bits if self.has_zeros else 1

    def parts(self, name: str, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """See the base class."""
        rows, columns = shape
        per_word = 32 // self.bits
        group = self.group or columns
        if columns % group and not self.reordered:
            raise ValueError(f"{columns} columns are no multiple of groups of {group}")
        groups = -(-columns // group)
        found = [
            Part(name, (rows, -(-columns // per_word)), torch.int32),
            Part(f"{name}.scale", (rows, groups), self.scale_dtype),
        ]
        if self.has_zeros:
            found.append(Part(f"{name}.zero", (-(-rows // per_word), groups), torch.int32))
        if self.reordered:
            found.append(Part(f"{name}.group", (columns,), torch.int32))
        # Where a row does not fill its last word only the shape tells its length.
        return (*found, Part(f"{name}.shape", (2,), torch.int64)) if columns % per_word else tuple(found)

    def rows(self, views: Mapping[str, torch.Tensor], name: str, first: int, last: int) -> torch.Tensor:
        """See the base class."""
        offset, per_word = 1 << (self.bits - 1), 32 // self.bits
        values = fields(views[name][first:last], self.bits) - offset
        if f"{name}.shape" in views:
            values = values[:, : int(views[f"{name}.shape"][1])]
        columns = values.shape[1]
        scales = self._of_columns(views, name, views[f"{name}.scale"][first:last], columns)
        values = values.to(self.scale_dtype)
        if self.has_zeros:
            words = views[f"{name}.zero"][first // per_word : -(-last // per_word)]
            zeros = fields(words.t().contiguous(), self.bits).t()[: last - first] - offset
            values = values - self._of_columns(views, name, zeros.to(self.scale_dtype), columns)
        return (values * scales).float()

    def quantize(self, matrix: torch.Tensor) -> dict[str, torch.Tensor]:
        """See the base class. Symmetric; of a few scales a group takes the one with the least squared error."""
        rows, columns = matrix.shape
        group, limit = self.group or columns, 1 << (self.bits - 1)
        values = functional.pad(matrix.float(), (0, -columns % group)).unflatten(1, (-1, group))
        largest = values.abs().amax(-1)
        best = torch.full_like(largest, torch.inf)
        codes, scales = torch.zeros_like(values), torch.ones_like(largest)
        for divisor in (limit - 1, limit - 0.5, limit, limit + 0.5, limit + 1):
            scale = (largest / divisor).to(self.scale_dtype).float()
            scale = torch.where(scale > 0, scale, 1.0)
            found = (values / scale.unsqueeze(-1)).round().clamp(-limit, limit - 1)
            error = (found * scale.unsqueeze(-1) - values).square().sum(-1)
            better = error < best
            best = torch.where(better, error, best)
            scales = torch.where(better, scale, scales)
            codes = torch.where(better.unsqueeze(-1), found, codes)
        packed = packed_fields(codes.flatten(1)[:, :columns].long() + limit, self.bits)
        parts = {"": packed, ".scale": scales.to(self.scale_dtype)}
        return parts if columns % (32 // self.bits) == 0 else parts | {".shape": torch.tensor([rows, columns])}

    def _of_columns(
        self, views: Mapping[str, torch.Tensor], name: str, groups: torch.Tensor, columns: int
    ) -> torch.Tensor:
        """What belongs to each column of [rows, groups]."""
        if self.reordered:
            return groups.index_select(1, views[f"{name}.group"].long())
        return spread(groups, self.group or columns, columns, 1)
