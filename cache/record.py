"""The layout of a record: one expert's weights as contiguous bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

ALIGNMENT = 64
"""Alignment of each part in bytes: one cache line, and a multiple of every dtype's size."""


class ExpertId(NamedTuple):
    """An expert's address: the index of its layer among the MoE layers, and its index in that layer."""

    layer: int
    number: int


@dataclass(frozen=True)
class Part:
    """One tensor of a record: its name in the experts module, and its shape and dtype for one expert."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of this part, without padding."""
        return math.prod(self.shape) * self.dtype.itemsize


class RecordLayout:
    """The offsets of the parts in a record. Another expert format is another list of parts."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)
        offsets, end = [], 0
        for part in self.parts:
            offsets.append(end)
            end = round_up(end + part.nbytes, ALIGNMENT)
        self.offsets = tuple(offsets)
        """The offset of each part in the record, in bytes."""
        self.nbytes = end
        """Bytes of a record, including the padding between parts."""

    def views(self, record: torch.Tensor) -> dict[str, torch.Tensor]:
        """The parts of `record` by name, as tensors that share its memory.

        `record` is uint8 [at least `nbytes`], on any device.
        """
        return {
            part.name: record[offset : offset + part.nbytes].view(part.dtype).view(part.shape)
            for part, offset in zip(self.parts, self.offsets, strict=True)
        }

    def part_offset(self, name: str) -> int:
        """The offset in bytes of the part `name`. Raises KeyError when the layout has no such part."""
        for part, offset in zip(self.parts, self.offsets, strict=True):
            if part.name == name:
                return offset
        raise KeyError(name)

    def places(self, name: str) -> dict[str, int]:
        """The offset in bytes of each part of the matrix `name`, by what follows that in the part's name."""
        return {
            part.name[len(name) :]: offset
            for part, offset in zip(self.parts, self.offsets, strict=True)
            if part.name == name or part.name.startswith(f"{name}.")
        }


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


def host_bytes(tensor: torch.Tensor) -> memoryview:
    """The writable memory of a host tensor, uint8 [n]."""
    return memoryview(tensor.numpy())  # type: ignore[arg-type]
