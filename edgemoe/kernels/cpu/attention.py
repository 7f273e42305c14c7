"""Attention of few tokens on CPUs, each with the bits that it has alone: by kernels, in bf16 and float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from edgemoe.kernels.cpu.arrays import flat
from edgemoe.kernels.cpu.threads import KernelThreads, kernels_have_the_cores

DTYPES = (torch.bfloat16, torch.float32)


class SeenKeys(NamedTuple):
    """Which keys each of some tokens attends to: first a range of them, then single ones, all int64 arrays."""

    spans: Any
    """Of each token the first key of its range and the end, [tokens, 2]."""
    places: Any
    """The single keys of all tokens, ascending for each."""
    starts: Any
    """Where those of each token begin in `places`, and the end, [tokens + 1]."""

    @classmethod
    def ranges(cls, spans: Sequence[tuple[int, int]]) -> SeenKeys:
        """Ranges alone."""
        return cls(np.array(spans, np.int64), np.empty(0, np.int64), np.zeros(len(spans) + 1, np.int64))

    @classmethod
    def visible(cls, visible: torch.Tensor) -> SeenKeys:
        """What is true in `visible`, bool [tokens, keys]; each token sees a key."""
        spans, singles = [], []
        for row in visible.numpy():
            seen = np.flatnonzero(row)
            near = int(np.count_nonzero(seen == seen[0] + np.arange(len(seen))))
            spans.append((int(seen[0]), int(seen[0]) + near))
            singles.append(seen[near:])
        starts = np.cumsum([0, *map(len, singles)]).astype(np.int64)
        return cls(np.array(spans, np.int64), np.concatenate(singles).astype(np.int64), starts)

    def of(self, token: int) -> slice | torch.Tensor:
        """The keys of one token: a slice where they are adjacent, else their places."""
        first, last = self.spans[token].tolist()
        singles = self.places[self.starts[token] : self.starts[token + 1]]
        if not len(singles):
            return slice(first, last)
        return torch.from_numpy(np.concatenate([np.arange(first, last), singles]))


def fits(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether there is a kernel for these, [1, heads, tokens, width] each, whose rows are contiguous."""
    every = (query, keys, values)
    return (
        query.dtype in DTYPES
        and all(each.dtype is query.dtype and each.device.type == "cpu" for each in every)
        and all(len(each) == 1 and each.stride(-1) == 1 for each in every)
    )


def attend(
    threads: KernelThreads,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    seen: SeenKeys,
    scaling: float | None,
) -> torch.Tensor:
    """Softmax(query · keys · scaling) · values for each token and the keys that it sees, [1, tokens, heads, width].

    `query` is [1, heads, tokens, width]; the others have as many heads, or a divisor of them, each for as many adjacent
    heads of the query. `fits` must hold. `scaling` is 1 / sqrt(width) where it is None.
    """
    # Imported late: importing numba is slow.
    from edgemoe.kernels.cpu import attention_kernels

    _, heads, tokens, width = query.shape
    groups, depth = keys.shape[1], values.shape[-1]
    out = query.new_empty(1, tokens, heads, depth)
    strides = [each.stride()[1:3] for each in (query, keys, values, out.transpose(1, 2))]
    shape = np.array([groups, heads // groups, tokens, width, depth, *(step for own in strides for step in own)])
    q, k, v, result = map(flat, (query, keys, values, out))
    scale = np.float32(width**-0.5 if scaling is None else scaling)

    def run(first: int, last: int) -> None:
        attention_kernels.attend(q, k, v, shape, *seen, scale, result, first, last)

    pairs = int((seen.spans[:, 1] - seen.spans[:, 0]).sum()) + len(seen.places)
    # Where PyTorch has several threads, they have the other cores.
    nbytes = pairs * groups * (width + depth) * query.element_size() if kernels_have_the_cores(threads) else 0
    threads.split(groups * tokens, run, nbytes=nbytes)
    return out
