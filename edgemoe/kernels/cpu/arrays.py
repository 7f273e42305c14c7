"""What compiled loops take: addresses of tensors on a CPU, counts and steps, as words."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch


class Groups(NamedTuple):
    """Which pairs of a token and a matrix are multiplied: those `starts[i]` ≤ p < `starts[i + 1]` by `slots[i]`'s."""

    slots: Any
    starts: Any
    """Arrays of int64."""

    @classmethod
    @lru_cache(64)
    def of_one(cls, tokens: int) -> Groups:
        """All tokens by the matrix of the first record. Shared: not to be changed."""
        return cls(np.zeros(1, np.int64), np.array([0, tokens]))

    def in_portions(self, most: int) -> Groups:
        """The same pairs in groups of at most `most`: several of one slot where there are more."""
        slots, starts = self
        counts = starts[1:] - starts[:-1]
        if starts[-1] == len(slots) or int(counts.max()) <= most:
            return self
        bounds = [np.arange(first, last, most) for first, last in zip(starts[:-1], starts[1:], strict=True)]
        return Groups(np.repeat(slots, -(-counts // most)), np.concatenate([*bounds, starts[-1:]]))

    @property
    def largest(self) -> int:
        """The pairs of the largest group."""
        return int((self.starts[1:] - self.starts[:-1]).max())


class Job:
    """What a native kernel multiplies: addresses, counts, and steps in bytes, in the order of `dot_block.Operands`.

    Holds what it names, so that it stays where it is.
    """

    __slots__ = ("_held", "_words", "address")

    def __init__(self, words: Sequence[int], held: object) -> None:
        self._words = array("q", words)
        self._held = held
        self.address = self._words.buffer_info()[0]
        """Of the words, as long as this object is there."""

    def set(self, place: int, word: int) -> None:
        """Changes a word, between runs of the kernel. What it names has to stay where it is while the kernel runs."""
        self._words[place] = word


class Matrix(NamedTuple):
    """A matrix at one place of every record in memory."""

    address: int
    """Of the one in slot 0."""
    slot_step: int
    """Bytes from one record to the next."""
    columns: int
    parts: tuple[int, ...] = ()
    """The offsets of a packed matrix's parts from its address."""

    def product(self, groups: Groups, x: torch.Tensor, out: torch.Tensor, first_row: int = 0) -> Job:
        """The products of `x`, the inputs of pairs, to `out`; the rows of both are contiguous.

        The matrix's rows are those of `out` from `first_row` on.
        """
        slots, starts = groups
        words = (
            address(slots), address(starts), len(slots), self.address, self.slot_step,
            x.data_ptr(), x.stride(0) * x.element_size(),
            out.data_ptr() + first_row * out.element_size(), out.stride(0) * out.element_size(),
            self.columns, *self.parts,
        )  # fmt: skip
        return Job(words, (groups, x, out))

    @property
    def only_part(self) -> Matrix:
        """The same with its only part at the address."""
        (place,) = self.parts
        return self._replace(address=self.address + place, parts=())

    def widening(self, slots: Any) -> Job:
        """The rows in `slots[0]`, an int64 array, without a token: they are only widened."""
        words = (address(slots), 0, 0, self.address, self.slot_step, 0, 0, 0, 0, self.columns, *self.parts)
        return Job(words, slots)


def address(values: Any) -> int:
    """Of the first value of an array of numpy."""
    return int(values.__array_interface__["data"][0])
