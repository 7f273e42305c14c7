"""Tensors on a CPU as compiled loops take them: addresses, or numpy's arrays, where bf16 is uint16."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import numpy as np
import torch


def flat(values: torch.Tensor) -> Any:
    """The memory from the first to the last of `values`, with what lies between them, one-dimensional. Shared."""
    extent = 1 + sum((size - 1) * step for size, step in zip(values.shape, values.stride(), strict=True))
    return array(values.as_strided((extent,), (1,)))


def array(values: torch.Tensor) -> Any:
    """The contiguous `values`, in their shape. Shared."""
    return values.view(torch.int16).numpy().view(np.uint16) if values.dtype is torch.bfloat16 else values.numpy()


class Job:
    """What a native kernel multiplies: addresses, counts, and steps in bytes, in the order of `dot_block.Operands`.

    Holds the arrays that it names, so that they stay where they are.
    """

    def __init__(self, matrix: int, slot_step: int, columns: int, parts: Sequence[int] = ()) -> None:
        """`matrix` is the address of the matrix in slot 0; `parts` are the offsets of its parts from there."""
        self._words = np.array([0, 0, 0, matrix, slot_step, 0, 0, 0, 0, columns, *parts], np.int64)
        self._held: tuple[Any, ...] = ()

    def of(self, slots: Any, starts: Any, x: torch.Tensor, out: torch.Tensor, first_row: int = 0) -> Job:
        """The same matrix with arguments: `slots` and `starts`, int64 arrays, and the inputs and results of pairs.

        The rows of `x` and `out` are contiguous. The matrix's rows are those of `out` from `first_row` on.
        """
        other = copy(self)
        other._words = words = self._words.copy()
        words[:3] = address(slots), address(starts), len(starts) - 1
        words[5:7] = x.data_ptr(), x.stride(0) * x.element_size()
        words[7:9] = out.data_ptr() + first_row * out.element_size(), out.stride(0) * out.element_size()
        other._held = slots, starts, x, out
        return other

    def widening(self, slots: Any) -> Job:
        """The same matrix in `slots[0]`, with no token: its rows are only widened."""
        other = copy(self)
        other._words = self._words.copy()
        other._words[0], other._held = address(slots), (slots,)
        return other

    @property
    def address(self) -> int:
        """Of the words, as long as this object is there."""
        return address(self._words)


def address(values: Any) -> int:
    """Of the first value of an array of numpy."""
    return int(values.__array_interface__["data"][0])
