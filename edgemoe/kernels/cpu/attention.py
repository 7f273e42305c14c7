"""Attention of few tokens on CPUs, each with the bits that it has alone: by kernels, in bf16 and float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from edgemoe.kernels.cpu.arrays import Job, address
from edgemoe.kernels.cpu.threads import KernelThreads, kernels_have_the_cores

if TYPE_CHECKING:
    from edgemoe.kernels.cpu.program import Step

DTYPES = (torch.bfloat16, torch.float32)
REGISTER = 16
"""Values that widths are a multiple of: those of the widest register."""


class SeenKeys(NamedTuple):
    """Which keys each of some tokens attends to: first a range of them, then single ones, all int64 arrays."""

    spans: Any
    """Of each token the first key of its range and the end, [tokens, 2]."""
    places: Any
    """The single keys of all tokens, ascending for each."""
    starts: Any
    """Where those of each token begin in `places`, and the end, [tokens + 1]."""

    most: int
    """Of the keys that one token sees."""
    total: int
    """Of the keys that all tokens see."""

    @classmethod
    def ranges(cls, spans: Sequence[tuple[int, int]]) -> SeenKeys:
        """Ranges alone."""
        return cls._counted(spans, [np.empty(0, np.int64)] * len(spans))

    @classmethod
    def visible(cls, visible: torch.Tensor) -> SeenKeys:
        """What is true in `visible`, bool [tokens, keys]; each token sees a key."""
        spans, singles = [], []
        for row in visible.numpy():
            seen = np.flatnonzero(row)
            near = int(np.count_nonzero(seen == seen[0] + np.arange(len(seen))))
            spans.append((int(seen[0]), int(seen[0]) + near))
            singles.append(seen[near:])
        return cls._counted(spans, singles)

    @classmethod
    def _counted(cls, spans: Sequence[tuple[int, int]], singles: Sequence[Any]) -> SeenKeys:
        counts = [end - first + len(own) for (first, end), own in zip(spans, singles, strict=True)]
        starts = np.cumsum([0, *map(len, singles)])
        places = np.concatenate(singles).astype(np.int64)
        return cls(np.array(spans, np.int64), places, starts, max(counts), sum(counts))

    def of(self, token: int) -> slice | torch.Tensor:
        """The keys of one token: a slice where they are adjacent, else their places."""
        first, last = self.spans[token].tolist()
        singles = self.places[self.starts[token] : self.starts[token + 1]]
        if not len(singles):
            return slice(first, last)
        return torch.from_numpy(np.concatenate([np.arange(first, last), singles]))


def fits(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether there is a kernel for these, [1, heads, tokens, width] each: rows are contiguous and whole registers."""
    every = (query, keys, values)
    return (
        query.dtype in DTYPES
        and query.shape[-1] % REGISTER == 0
        and values.shape[-1] % REGISTER == 0
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
    out = query.new_empty(1, query.shape[2], query.shape[1], values.shape[-1])
    step = attention_step(query, keys, values, seen, scaling, out)
    # Where PyTorch has several threads, they have the other cores.
    threads.run([step], alone=not kernels_have_the_cores(threads))
    return out


def padded_keys(count: int) -> int:
    """The scores of a head that there is room for, for `count` keys: whole registers."""
    return -(-count // REGISTER) * REGISTER


def attention_step(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    seen: SeenKeys,
    scaling: float | None,
    out: torch.Tensor,
) -> Step:
    """The step that writes the result of `attend` to `out`; the others may be written by earlier steps."""
    # Imported late: importing numba is slow.
    from edgemoe.kernels.cpu.attention_kernels import Words, attend_bf16, attend_f32
    from edgemoe.kernels.cpu.program import Step

    _, heads, tokens, width = query.shape
    groups, depth, nbytes = keys.shape[1], values.shape[-1], query.element_size()
    group = heads // groups
    padded = padded_keys(seen.most)
    steps = [step * nbytes for each in (query, keys, values, out.transpose(1, 2)) for step in each.stride()[1:3]]
    scale = np.float32(width**-0.5 if scaling is None else scaling)
    words = Words._make([
        query.data_ptr(), keys.data_ptr(), values.data_ptr(), out.data_ptr(), group, tokens, width, depth, *steps,
        address(seen.spans), address(seen.places), address(seen.starts), padded, int(scale.view(np.uint32)),
    ])  # fmt: skip
    job = Job(words, (query, keys, values, seen, out))
    kernel = attend_bf16 if query.dtype is torch.bfloat16 else attend_f32
    # With several query heads a key, multiplying takes longer than reading.
    read = seen.total * groups * (width + depth) * nbytes * max(1, group // 2)
    return Step(kernel, job, groups * tokens, read, scratch_nbytes=4 * group * (padded + width))
