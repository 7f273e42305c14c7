"""One expert's weights as one contiguous run of bytes, with a declared layout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

ALIGNMENT = 64
"""Every part starts at a multiple of this many bytes: a cache line, and enough for any dtype."""


class ExpertId(NamedTuple):
    """An expert's address: the ordinal of its MoE layer (0 is the first that has experts), and its number in it."""

    layer: int
    number: int


@dataclass(frozen=True)
class Part:
    """One tensor of a record: its name in the experts module, and one expert's shape and dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of this part without padding."""
        return math.prod(self.shape) * self.dtype.itemsize


class RecordLayout:
    """How the parts of one expert lie in a record. A new expert format is a new declaration of parts."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)
        offsets, end = [], 0
        for part in self.parts:
            offsets.append(end)
            end = round_up(end + part.nbytes, ALIGNMENT)
        self.offsets = tuple(offsets)
        """Where each part starts in the record, in bytes."""
        self.nbytes = end
        """Bytes of a record, padding between parts included."""

    def views(self, record: torch.Tensor) -> dict[str, torch.Tensor]:
        """The parts of a record as tensors that share its memory.

        `record` is a one-dimensional uint8 tensor of at least `nbytes` bytes on any device.
        """
        return {
            part.name: record[offset : offset + part.nbytes].view(part.dtype).view(part.shape)
            for part, offset in zip(self.parts, self.offsets, strict=True)
        }

    def part_offset(self, name: str) -> int:
        """Where the part called `name` starts, in bytes; KeyError when the layout has no such part."""
        for part, offset in zip(self.parts, self.offsets, strict=True):
            if part.name == name:
                return offset
        raise KeyError(name)


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple


def host_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a one-dimensional uint8 tensor on the host, writable."""
    return memoryview(tensor.numpy())  # type: ignore[arg-type]
