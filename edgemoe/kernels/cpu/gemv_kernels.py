"""GEMV kernels for CPUs: each weight is read once, from slots or from a matrix, at memory speed.

Decoding one token is bound by this bandwidth, and PyTorch's GEMV reaches 8 to 21 GB/s in bf16 where two cores can read
40. numba compiles the loops for the CPU they run on, needs no compiler, and caches the result on disk. All sums are
float32.

A weight matrix is row-major `[rows, columns]`, or, where a family stores it transposed, `[columns, rows]`. Buffers are
unsigned integers, since numpy has no bf16: uint16 for bf16 and fp16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from edgemoe.cache.compiled import compiled
from edgemoe.kernels.cpu import dot_block
from edgemoe.kernels.cpu.dot_block import PairsOfBf16, Widened

CACHE_LINE = 16
"""Float32 values in a cache line."""
MAX_TOKENS = 64
"""Tokens per matrix up to which 16-bit weights are multiplied by kernels: PyTorch's products are faster beyond."""

_options: dict[str, Any] = {
    "nogil": True,
    "fastmath": True,
    "boundscheck": False,
    "error_model": "numpy",
}

_dots_bf16 = dot_block.grouped_dots(dot_block.Widened("bf16"))
_dots_f16 = dot_block.grouped_dots(dot_block.Widened("f16"))
_dots_f32 = dot_block.grouped_dots(dot_block.Widened("f32"))
if dot_block.PairsOfBf16.available():
    _dots_of_pairs = dot_block.grouped_dots(dot_block.PairsOfBf16())


@compiled(**_options)
def grouped_gemv_bf16(slots, offset, columns, pool, starts, x, out, first, last):  # type: ignore[no-untyped-def]
    """out[p, r] = W(slot of p)[r] · x[p] for the rows first ≤ r < last; bf16 weights.

    The pairs `starts[i]` ≤ p < `starts[i + 1]` belong to `slots[i]`, of which each row is read from memory once for all
    of them. `slots` and `starts` are int64. `pool` is uint16 [slots, values]; `offset` is the matrix's first value in a
    slot; `columns` is the number of values in a row; `x` is float32 [pairs, columns]; `out` is float32 [pairs, rows],
    written. The rows of `x` and `out` are contiguous.
    """
    _dots_bf16(slots, offset, columns, pool, starts, x, out, first, last)


@compiled(**_options)
def grouped_gemv_f16(slots, offset, columns, pool, starts, x, out, first, last):  # type: ignore[no-untyped-def]
    """As `grouped_gemv_bf16` for fp16 weights."""
    _dots_f16(slots, offset, columns, pool, starts, x, out, first, last)


@compiled(**_options)
def grouped_gemv_f32(slots, offset, columns, pool, starts, x, out, first, last):  # type: ignore[no-untyped-def]
    """As `grouped_gemv_bf16` for float32 weights; `pool` is float32."""
    _dots_f32(slots, offset, columns, pool, starts, x, out, first, last)


@compiled(**_options)
def grouped_gemv_bf16_pairs(slots, offset, columns, pool, starts, x, out, first, last):  # type: ignore[no-untyped-def]
    """As `grouped_gemv_bf16` with AVX512-BF16: `x` is uint16, and `columns` a multiple of 32."""
    _dots_of_pairs(slots, offset, columns, pool, starts, x, out, first, last)


@compiled(**_options)
def grouped_gemv_bf16_transposed(slots, offset, rows, pool, starts, x, out, first, last):  # type: ignore[no-untyped-def]
    """As `grouped_gemv_bf16` for matrices stored [columns, rows]; `pool` is uint16, `offset` is in values."""
    columns = x.shape[1]
    for i in range(slots.shape[0]):
        for p in range(starts[i], starts[i + 1]):
            result = out[p]
            value = x[p]
            for r in range(first, last):
                result[r] = np.float32(0)
            for c in range(columns):
                row = pool[slots[i], offset + c * rows : offset + (c + 1) * rows]
                scale = value[c]
                for r in range(first, last):
                    result[r] += np.uint32(np.uint32(row[r]) << np.uint32(16)).view(np.float32) * scale


@dataclass(frozen=True)
class Kernel:
    """A compiled loop and the arrays that it takes."""

    run: Callable[..., None]
    """One of the loops above, with the arguments of `grouped_gemv_bf16`."""
    unit: Any
    """The numpy dtype of `pool`."""
    max_tokens: int
    """Tokens per matrix up to which the loop is faster than PyTorch's product (measured)."""
    takes_bf16: bool = False
    """Whether `x` is bf16, passed as uint16, and not float32."""

    def values(self, x: torch.Tensor) -> Any:
        """`x`, [pairs, columns] in any float dtype, as the loop takes it."""
        if self.takes_bf16:
            return x.to(torch.bfloat16).contiguous().view(torch.int16).numpy().view(np.uint16)
        return x.float().contiguous().numpy()

    @staticmethod
    def results(pairs: int, rows: int) -> Any:
        """An uninitialised array for the results, float32 [pairs, rows].

        Its rows are padded by a cache line: `rows` is often a multiple of a power of two, and at such strides the
        writes of many pairs would compete for the same few lines of the cache.
        """
        return np.empty((pairs, rows + CACHE_LINE), np.float32)[:, :rows]


def row_kernel(dtype: torch.dtype, columns: int) -> Kernel | None:
    """The kernel for row-major matrices [rows, columns] of `dtype`; None when there is none."""
    if dtype is torch.bfloat16 and columns % PairsOfBf16.values == 0 and PairsOfBf16.available():
        return Kernel(grouped_gemv_bf16_pairs, np.uint16, MAX_TOKENS, takes_bf16=True)
    kinds = {
        torch.bfloat16: Kernel(grouped_gemv_bf16, np.uint16, MAX_TOKENS),
        torch.float32: Kernel(grouped_gemv_f32, np.float32, 2),
    }
    if Widened.available("f16"):
        kinds[torch.float16] = Kernel(grouped_gemv_f16, np.uint16, MAX_TOKENS)
    return kinds.get(dtype)


def column_kernel(dtype: torch.dtype) -> Kernel | None:
    """The kernel for transposed matrices, [columns, rows], of `dtype`; None when there is none."""
    return Kernel(grouped_gemv_bf16_transposed, np.uint16, 2) if dtype is torch.bfloat16 else None
