"""Where the tokens of a pass and the keys that they see lie: one int64 tensor, copied to the device at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

DRAFTED = 64
"""Rows behind a sequence's base that a bit mask of int64 tells apart."""
ALIGNMENT = 16
"""Bytes that the addresses of buffers are a multiple of, so that kernels can load 16 bytes at once."""
_BUFFER_FIELDS = 4


class Buffer(NamedTuple):
    """Keys [1, heads, capacity, width] and values [1, heads, capacity, value width] of one layer of one sequence.

    Both are contiguous buffers on the device, filled or not. Their first row is that of the sequence's token `dropped`:
    0 unless a sliding window has dropped rows. The device reads and writes them after `fill`: the caller keeps them.
    """

    keys: torch.Tensor
    values: torch.Tensor
    dropped: int = 0


def buffer_table(layers: Iterable[Buffer]) -> torch.Tensor:
    """int64 [layers, 4]: addresses of keys and values, capacity and dropped rows; valid until a buffer is replaced.

    ValueError for buffers that are not as `Buffer` says, or not aligned.
    """
    rows = []
    for at, (keys, values, dropped) in enumerate(layers):
        if keys.shape[:-1] != values.shape[:-1] or len(keys) != 1:
            raise ValueError(f"layer {at}: keys {list(keys.shape)} do not fit values {list(values.shape)}")
        if not (keys.is_contiguous() and values.is_contiguous()):
            raise ValueError(f"layer {at}: buffers of keys and values have to be contiguous")
        addresses = keys.data_ptr(), values.data_ptr()
        if any(address % ALIGNMENT for address in addresses):
            raise ValueError(f"layer {at}: buffers at {addresses}, which are not multiples of {ALIGNMENT} bytes")
        rows.append((*addresses, keys.shape[2], dropped))
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, _BUFFER_FIELDS)


class PassSequence(NamedTuple):
    """The tokens of one sequence in a pass.

    Each token sees the first `base` rows of the sequence, and of the rows behind them those in its bit mask in `seen`:
    bit j is row `base` + j. The rows from `base` on hold `drafted` tokens of earlier passes, then the tokens of this
    pass in their order. A mask has the token's own bit, and marks a path: its bits, ascending, are tokens that follow
    one another from position `base` on. `buffers` is what `buffer_table` made for the sequence.
    """

    base: int
    seen: Sequence[int]
    buffers: torch.Tensor
    drafted: int = 0

    @classmethod
    def causal(cls, base: int, tokens: int, buffers: torch.Tensor) -> PassSequence:
        """`tokens` tokens that follow one another."""
        return cls(base, [(2 << at) - 1 for at in range(tokens)], buffers)


class PassLayout:
    """The parts of the metadata of passes of `tokens` tokens over `layers` layers, int64 [size]:

    - position of each token, [tokens];
    - base of each token's sequence, [tokens];
    - row of each token, counted from its sequence's first token, [tokens];
    - number of tokens that are no padding, [1];
    - of each token the rows that it sees from its base on, counted from there, ascending, [tokens, 64];
    - key address, value address, capacity, dropped rows of each layer's buffers of each token, [layers, tokens, 4].
    """

    def __init__(self, tokens: int, layers: int, context: int) -> None:
        """Sequences have at most `context` tokens, drafts included."""
        self.tokens = tokens
        self.layers = layers
        self.context = context
        self.size = table_start(tokens, layers)

    def fill(self, host: torch.Tensor, sequences: Sequence[PassSequence]) -> None:
        """Overwrites `host`, int64 [size] on the CPU, with the metadata of a pass over the tokens of `sequences`.

        What is left of the pass's tokens is padding, at position 0. The copy to the device is the caller's.
        ValueError for sequences that do not fit into the pass, the context, their buffers or a mask.
        """
        if host.shape != (self.size,) or host.dtype != torch.int64:
            raise ValueError(f"metadata is int64 [{self.size}], not {host.dtype} {list(host.shape)}")
        live = sum(len(each.seen) for each in sequences)
        if live > self.tokens:
            raise ValueError(f"{live} tokens in a pass of {self.tokens}")
        positions, bases, rows, paths = [], [], [], []
        for each in sequences:
            self._check(each)
            for at, mask in enumerate(each.seen, each.drafted):
                path = [row for row in range(at + 1) if mask >> row & 1]
                positions.append(each.base + len(path) - 1)
                bases.append(each.base)
                rows.append(each.base + at)
                paths.append(path + [0] * (DRAFTED - len(path)))
        padding = [0] * (self.tokens - live)
        start = table_start(self.tokens, 0)
        flat = [*positions, *padding, *bases, *padding, *rows, *padding, live, *(row for path in paths for row in path)]
        host[: len(flat)] = torch.tensor(flat, dtype=torch.int64)
        host[len(flat) :] = 0
        table = host[start:].view(self.layers, self.tokens, _BUFFER_FIELDS)
        first = 0
        for each in sequences:
            table[:, first : first + len(each.seen)] = each.buffers[:, None, :]
            first += len(each.seen)

    def positions(self, metadata: torch.Tensor) -> torch.Tensor:
        """A view of `metadata`, on any device: the positions of its tokens, int64 [1, tokens]."""
        return metadata[: self.tokens].view(1, -1)

    def live(self, metadata: torch.Tensor) -> torch.Tensor:
        """A view of `metadata`, on any device: the number of tokens that are no padding, int64 [1]."""
        return metadata[3 * self.tokens : 3 * self.tokens + 1]

    def _check(self, sequence: PassSequence) -> None:
        base, seen, buffers, drafted = sequence
        ends = drafted + len(seen)
        if buffers.shape != (self.layers, _BUFFER_FIELDS):
            raise ValueError(f"buffers of {len(buffers)} layers for a pass over {self.layers}")
        if ends > DRAFTED:
            raise ValueError(f"{ends} tokens behind the base of a sequence, of which masks tell {DRAFTED} apart")
        if base + ends > self.context:
            raise ValueError(f"a sequence of {base + ends} tokens in passes of at most {self.context}")
        for at, mask in enumerate(seen, drafted):
            if mask >> at != 1:
                raise ValueError(f"mask {mask:#x} of the token at row {base} + {at}, which has to be its highest bit")
        capacity = int((buffers[:, 2] + buffers[:, 3]).min()) if len(buffers) else self.context
        if base + ends > capacity:
            raise ValueError(f"a sequence of {base + ends} tokens in buffers that end at token {capacity}")
        if len(buffers) and int(buffers[:, 3].max()) > base:
            raise ValueError(f"{int(buffers[:, 3].max())} dropped rows of a sequence with {base} kept tokens")


def table_start(tokens: int, layer: int) -> int:
    """Where the buffers of `layer` begin in the metadata of a pass of `tokens` tokens."""
    return 3 * tokens + 1 + tokens * DRAFTED + layer * tokens * _BUFFER_FIELDS
