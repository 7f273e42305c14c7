"""A weight of a checkpoint that is stored in a packed format: the tensors that make it up, and how to read it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from edgemoe.cache.record import Part
from edgemoe.checkpoint.tensor_entry import TensorEntry
from edgemoe.formats.weight_format import WeightFormat

Convert = Callable[[Sequence[torch.Tensor]], Mapping[str, torch.Tensor]]
"""Makes the parts of a format, by suffix, of the tensors in the file, in the order of `PackedTensor.stored`."""


@dataclass(frozen=True)
class PackedTensor:
    """A matrix [rows, columns], or a stack [experts, rows, columns], in a packed format.

    To transformers it is a float tensor of `shape`.
    """

    format: WeightFormat
    stored: Mapping[str, TensorEntry]
    """The tensors in the file by the suffix of the format's part, stacked like the matrix; the first one is empty."""
    rows: int
    columns: int
    experts: int | None = None
    """The number of stacked matrices; None for a single one."""
    transposed: bool = False
    """Whether transformers' tensor is [..., columns, rows]."""
    reshape: Callable[[torch.Tensor], torch.Tensor] | None = None
    """What turns the float matrix into transformers' tensor, where that is no matrix or in another order."""
    convert: Convert | None = None
    """Where parts are not the tensors in the file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that transformers expects."""
        matrix = (self.columns, self.rows) if self.transposed else (self.rows, self.columns)
        shape = matrix if self.experts is None else (self.experts, *matrix)
        if self.reshape is None:
            return shape
        return tuple(self.reshape(torch.empty(shape, device="meta")).shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the files."""
        return sum(entry.nbytes for entry in self.stored.values())

    def parts(self, name: str) -> tuple[Part, ...]:
        """The parts of one matrix in a record."""
        return self.format.parts(name, (self.rows, self.columns))

    def expert(self, index: int) -> PackedTensor:
        """The matrix of one expert of a stack."""
        assert self.experts is not None
        stored = {suffix: entry.slice(index, self.experts) for suffix, entry in self.stored.items()}
        return replace(self, stored=stored, experts=None)

    def made(self, raw: Sequence[torch.Tensor], name: str = "") -> dict[str, torch.Tensor]:
        """The parts of one matrix, by their names in a record, of its tensors in the file."""
        found = self.convert(raw) if self.convert else dict(zip(self.stored, raw, strict=True))
        shapes = {part.name: part for part in self.parts(name)}
        return {name + suffix: value.view(shapes[name + suffix].shape) for suffix, value in found.items()}

    def float(self, raw: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """transformers' tensor, from the tensors in the file in the order of `stored`."""
        if self.experts is None:
            found = self._matrix(raw)
        else:
            single = replace(self, experts=None)
            whole = [entry.repeated for entry in self.stored.values()]
            found = torch.stack(
                [
                    single._matrix([each if own else each[index] for each, own in zip(raw, whole, strict=True)])
                    for index in range(self.experts)
                ]
            )
        # Before the rounding to another dtype: values may be changed, too.
        return (self.reshape(found) if self.reshape else found).to(dtype)

    def _matrix(self, raw: Sequence[torch.Tensor]) -> torch.Tensor:
        matrix = self.format.dequantize(self.made(raw), "")
        return matrix.t() if self.transposed else matrix


@dataclass(frozen=True)
class MergedTensor:
    """A dense weight that is made of several, which a file keeps apart."""

    sources: tuple[PackedTensor, ...]
    merge: Callable[[Sequence[torch.Tensor]], torch.Tensor]
    """transformers' tensor, of the sources' float tensors."""

    @property
    def stored(self) -> dict[str, TensorEntry]:
        """The tensors in the file, by names of their own."""
        return {f"{at}{key}": entry for at, each in enumerate(self.sources) for key, entry in each.stored.items()}

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that transformers expects."""
        return tuple(self.merge([torch.empty(each.shape, device="meta") for each in self.sources]).shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the files."""
        return sum(each.nbytes for each in self.sources)

    def float(self, raw: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """transformers' tensor, from the tensors in the file in the order of `stored`."""
        left = list(raw)
        parts = [each.float([left.pop(0) for _ in each.stored], torch.float32) for each in self.sources]
        return self.merge(parts).to(dtype)


Weight = TensorEntry | PackedTensor | MergedTensor
"""A tensor as it lies in a file, or what several of them make up."""


def fits(part: Part, entry: TensorEntry, experts: int | None) -> bool:
    """Whether a tensor in the file is what the format's part should be."""
    shape = part.shape if experts is None or entry.repeated else (experts, *part.shape)
    return entry.dtype == part.dtype and math.prod(entry.shape) == math.prod(shape)
