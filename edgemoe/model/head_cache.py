"""What a draft head keeps of one sequence: its keys and values, and the hidden states that it has not read yet."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from edgemoe.model.row_layers import reserve_rows


class HeadCache:
    """The head's part of a `SequenceCache`, which has one row for each token of the sequence but the last one.

    Row i is made of the model's hidden state of token i and of token i + 1. Hidden states wait here, as passes of the
    model give them, until the head reads them: `rows` have been read, and `waiting` ones have not. From `mark` to
    `rollback` those that are given are of drafted tokens, of which `rollback` keeps the accepted ones.

    Hidden states are [tokens, kinds, hidden size]: before and after the model's last norm while it is not known which
    of them the head reads, and the right ones alone later.
    """

    def __init__(self, kv: Any) -> None:
        """`kv` is an empty cache of transformers with a layer of ours for each layer of the head."""
        self.kv = kv
        self.rows = 0
        """Rows of keys and values, drafted ones included."""
        self._hidden: list[torch.Tensor] = []
        self._drafted: list[torch.Tensor] = []
        self._drafting = False
        self._empty: torch.Tensor | None = None

    @property
    def waiting(self) -> int:
        """Number of hidden states that wait."""
        return sum(map(len, self._hidden))

    def give(self, hidden: torch.Tensor) -> None:
        """Takes the hidden states of the next tokens, and keeps the tensor."""
        self._empty = hidden[:0]
        (self._drafted if self._drafting else self._hidden).append(hidden)

    def peek(self, count: int, kind: int) -> torch.Tensor:
        """The first `count` hidden states, [count, hidden size], of one kind where there are several."""
        found = [each[:, min(kind, each.shape[1] - 1)] for each in self._first(count)]
        return found[0] if len(found) == 1 else torch.cat(found)

    def _first(self, count: int) -> list[torch.Tensor]:
        """The tensors of the first `count` hidden states."""
        found, left = [], count
        for each in self._hidden:
            found.append(each[:left])
            left -= len(found[-1])
            if not left:
                break
        return found

    def drop_first(self, count: int) -> None:
        """Drops the first `count` hidden states, which the head has read."""
        while count:
            first = self._hidden[0]
            if len(first) > count:
                self._hidden[0] = first[count:]
                return
            count -= len(first)
            del self._hidden[0]

    def mark(self) -> None:
        """What is given from now on is of drafted tokens."""
        self._drafting = True

    def rollback(self, rows: Sequence[int]) -> None:
        """Keeps the hidden states of the drafted tokens `rows`, ascending and counted from `mark`."""
        drafted, self._drafted, self._drafting = self._drafted, [], False
        if not rows or not drafted:
            return
        joined = drafted[0] if len(drafted) == 1 else torch.cat(drafted)
        chained = list(rows) == list(range(len(rows)))
        self._hidden.append(joined[: len(rows)] if chained else joined[list(rows)])

    def mark_rows(self) -> None:
        """`drop_rows` may drop the rows that are appended from now on."""
        for layer in self.kv.layers:
            layer.mark()

    def drop_rows(self, rows: int) -> None:
        """Drops all but the first `rows` rows: those that were appended since `mark_rows`."""
        for layer in self.kv.layers:
            layer.rollback(rows, ())
        self.rows = rows

    def reserve(self, capacity: int) -> None:
        """Raises the number of rows that the next buffers will hold."""
        reserve_rows(self.kv, capacity)

    def crop(self, tokens: int) -> None:
        """Keeps what belongs to the first `tokens` tokens, at least one; only where rows can be cropped.

        The row of the last one of them depends on what follows. Where its hidden state has been read, zeros take its
        place: the row is then made of the embedding of the token that follows.
        """
        if self.rows < tokens:
            self._hidden = self._first(tokens - self.rows)
            return
        for layer in self.kv.layers:
            layer.crop(tokens - 1 - self.rows)
        assert self._empty is not None
        self.rows, self._hidden = tokens - 1, [self._empty.new_zeros(1, *self._empty.shape[1:])]

    def fork(self, layers: Sequence[Any]) -> HeadCache:
        """A copy with `layers`, copies of those of `kv`."""
        kv = copy.copy(self.kv)
        kv.layers = list(layers)
        other = HeadCache(kv)
        other.rows, other._empty = self.rows, self._empty
        other._hidden = [each.clone() for each in self._hidden]
        return other
