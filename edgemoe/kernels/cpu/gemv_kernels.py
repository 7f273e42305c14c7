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
from edgemoe.kernels.cpu import dot_bf16

CACHE_LINE = 16
"""Float32 values in a cache line."""

_options: dict[str, Any] = {
    "nogil": True,
    "fastmath": True,
    "boundscheck": False,
    "error_model": "numpy",
}


@compiled(**_options)
def grouped_gemv_bf16(slots, offset, columns, pool, starts, x, out, first, last):  # type: ignore[no-untyped-def]
    """out[p, r] = W(slot of p)[r] · x[p] for the rows first ≤ r < last; bf16 weights, two in a word.

    The pairs `starts[i]` ≤ p < `starts[i + 1]` belong to `slots[i]`, of which each row is read once for all of them.
    `pool` is uint32 [slots, words]; `offset` is the matrix's first word in a slot; `columns` is the number of values
    in a row, even; `x` is float32 [pairs, columns]; `out` is float32 [pairs, rows], written.
    """
    words = columns // 2
    for i in range(slots.shape[0]):
        for r in range(first, last):
            row = pool[slots[i], offset + r * words : offset + (r + 1) * words]
            for p in range(starts[i], starts[i + 1]):
                value = x[p]
                low = np.float32(0)
                high = np.float32(0)
                for j in range(words):
                    word = row[j]
                    low += np.uint32(word << np.uint32(16)).view(np.float32) * value[2 * j]
                    high += np.uint32(word & np.uint32(0xFFFF0000)).view(np.float32) * value[2 * j + 1]
                out[p, r] = low + high


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


@compiled(**_options)
def grouped_gemv_f16(slots, offset, columns, pool, starts, x, out, first, last):  # type: ignore[no-untyped-def]
    """As `grouped_gemv_bf16` for finite fp16 weights; `pool` is uint16, `offset` is in values.

    The bits are widened without change of the exponent, and the sum is multiplied by 2^112, the difference of the two
    exponent biases. That is exact, for subnormals too.
    """
    rebase = np.float32(5.192296858534828e33)
    for i in range(slots.shape[0]):
        for r in range(first, last):
            row = pool[slots[i], offset + r * columns : offset + (r + 1) * columns]
            for p in range(starts[i], starts[i + 1]):
                value = x[p]
                total = np.float32(0)
                for j in range(columns):
                    half = np.uint32(row[j])
                    sign = np.uint32((half & np.uint32(0x8000)) << np.uint32(16))
                    magnitude = np.uint32((half & np.uint32(0x7FFF)) << np.uint32(13))
                    total += np.uint32(sign | magnitude).view(np.float32) * value[j]
                out[p, r] = total * rebase


@compiled(**_options)
def grouped_gemv_f32(slots, offset, columns, pool, starts, x, out, first, last):  # type: ignore[no-untyped-def]
    """As `grouped_gemv_bf16` for float32 weights; `pool` is float32, `offset` is in values."""
    for i in range(slots.shape[0]):
        for r in range(first, last):
            row = pool[slots[i], offset + r * columns : offset + (r + 1) * columns]
            for p in range(starts[i], starts[i + 1]):
                value = x[p]
                total = np.float32(0)
                for j in range(columns):
                    total += row[j] * value[j]
                out[p, r] = total


if dot_bf16.available():
    _dot_2x4, _dot_2x3, _dot_2x2, _dot_2x1 = (dot_bf16.dot_block(2, tokens) for tokens in (4, 3, 2, 1))
    _dot_1x1 = dot_bf16.dot_block(1, 1)


@compiled(**_options)
def grouped_gemv_bf16_dot(slots, offset, columns, pool, starts, x, out, first, last):  # type: ignore[no-untyped-def]
    """As `grouped_gemv_bf16` with the instruction of `dot_bf16`; `pool` and `x` are uint16, `offset` is in values.

    Computes blocks of two rows and four tokens: the first four tokens read the weights from memory, the others from
    the CPU's cache.
    """
    weights = pool.ctypes.data
    values = x.ctypes.data
    results = out.ctypes.data
    step = 2 * columns
    x_step = x.strides[0]
    out_step = out.strides[0]
    for i in range(slots.shape[0]):
        matrix = weights + 2 * (slots[i] * pool.shape[1] + offset)
        for r in range(first, last, 2):
            row = matrix + r * step
            p = starts[i]
            while p < starts[i + 1]:
                left = starts[i + 1] - p
                value = values + p * x_step
                result = results + p * out_step + 4 * r
                if r + 1 == last:
                    _dot_1x1(row, value, result, step, x_step, out_step, columns)
                    p += 1
                elif left >= 4:
                    _dot_2x4(row, value, result, step, x_step, out_step, columns)
                    p += 4
                elif left == 3:
                    _dot_2x3(row, value, result, step, x_step, out_step, columns)
                    p += 3
                elif left == 2:
                    _dot_2x2(row, value, result, step, x_step, out_step, columns)
                    p += 2
                else:
                    _dot_2x1(row, value, result, step, x_step, out_step, columns)
                    p += 1


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
    if dtype is torch.bfloat16:
        if columns % dot_bf16.VALUES == 0 and dot_bf16.available():
            return Kernel(grouped_gemv_bf16_dot, np.uint16, 64, takes_bf16=True)
        return Kernel(grouped_gemv_bf16, np.uint32, 2) if columns % 2 == 0 else None
    kinds = {
        torch.float16: Kernel(grouped_gemv_f16, np.uint16, 2),
        torch.float32: Kernel(grouped_gemv_f32, np.float32, 2),
    }
    return kinds.get(dtype)


def few_tokens(dtype: torch.dtype) -> int:
    """Tokens up to which a kernel multiplies most matrices of `dtype`; 0 without a kernel."""
    kernel = row_kernel(dtype, dot_bf16.VALUES)
    return kernel.max_tokens if kernel is not None else 0


def column_kernel(dtype: torch.dtype) -> Kernel | None:
    """The kernel for transposed matrices, [columns, rows], of `dtype`; None when there is none."""
    return Kernel(grouped_gemv_bf16_transposed, np.uint16, 2) if dtype is torch.bfloat16 else None
