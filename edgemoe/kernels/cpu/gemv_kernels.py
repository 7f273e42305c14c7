"""GEMV kernels for CPUs: each weight is read once, from slots or from a matrix, at memory speed.

Decoding one token is bound by this bandwidth, and PyTorch's GEMV reaches 8 to 21 GB/s in bf16 where two cores can read
40. numba compiles the loops for the CPU they run on, needs no compiler, and caches the result on disk. All sums are
float32.

A weight matrix is row-major `[rows, columns]`, or, where a family stores it transposed, `[columns, rows]`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numba import carray, types  # type: ignore[attr-defined]
from numba.extending import overload

from edgemoe.cache.compiled import Native, compiled
from edgemoe.kernels.cpu import dot_block
from edgemoe.kernels.cpu.dot_block import WORDS, PairsOfBf16, Widened
from edgemoe.kernels.cpu.row_kernels import widened
from edgemoe.kernels.cpu.vector_ir import pointer_to

CACHE_LINE = 16
"""Float32 values in a cache line."""
BLOCK_ACROSS, BLOCK_ALONG = 1024, 64
"""Values of a row, and rows, of a transposed matrix that several tokens share: of float32, a quarter of a MiB."""
ROWS_TOGETHER, ROWS_ACROSS = 12, 256
"""Rows of which a share is a multiple, for blocks of 2, 3 and 6 rows; and of a transposed matrix, side by side."""

_words, _bf16, _f32 = pointer_to(types.int64), pointer_to(types.uint16), pointer_to(types.float32)

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


@Native
def grouped_gemv_bf16(job, tile, first, last):  # type: ignore[no-untyped-def]
    """out[p, r] = W(slot of p)[r] · x[p] for the rows first ≤ r < last; bf16 weights.

    `job` is the address of an `arrays.Job`: the pairs `starts[i]` ≤ p < `starts[i + 1]` belong to `slots[i]`, of which
    each row is read from memory once for all of them. `x` is float32 [pairs, columns], and `out` float32 [pairs, rows].
    `tile` is not used.
    """
    _dots_bf16(job, tile, first, last)


@Native
def grouped_gemv_f16(job, tile, first, last):  # type: ignore[no-untyped-def]
    """As `grouped_gemv_bf16` for fp16 weights."""
    _dots_f16(job, tile, first, last)


@Native
def grouped_gemv_f32(job, tile, first, last):  # type: ignore[no-untyped-def]
    """As `grouped_gemv_bf16` for float32 weights."""
    _dots_f32(job, tile, first, last)


@Native
def grouped_gemv_bf16_pairs(job, tile, first, last):  # type: ignore[no-untyped-def]
    """As `grouped_gemv_bf16` with AVX512-BF16: `x` is bf16, and `columns` a multiple of 32."""
    _dots_of_pairs(job, tile, first, last)


@Native
def gemv_transposed_bf16(job, tile, first, last):  # type: ignore[no-untyped-def]
    """As `grouped_gemv_bf16` for matrices stored [columns, rows]; a word with the rows comes last in the job."""
    of = carray(_words(job), WORDS + 1)
    for i in range(of[2]):
        slots, starts = carray(_words(of[0]), of[2]), carray(_words(of[1]), of[2] + 1)
        _transposed(_bf16(of[3] + slots[i] * of[4]), of, starts[i], starts[i + 1], first, last)


@Native
def gemv_transposed_f32(job, tile, first, last):  # type: ignore[no-untyped-def]
    """As `gemv_transposed_bf16` for float32."""
    of = carray(_words(job), WORDS + 1)
    for i in range(of[2]):
        slots, starts = carray(_words(of[0]), of[2]), carray(_words(of[1]), of[2] + 1)
        _transposed(_f32(of[3] + slots[i] * of[4]), of, starts[i], starts[i + 1], first, last)


@compiled(**_options)
def _transposed(address, of, start, stop, first, last):  # type: ignore[no-untyped-def]
    """The products of one matrix, at `address`, with the pairs start ≤ p < stop; `of` are the words of a job."""
    columns, rows = of[9], of[10]
    matrix = carray(address, columns * rows)
    for p in range(start, stop):
        result = carray(_f32(of[7] + p * of[8]), last)
        for r in range(first, last):
            result[r] = np.float32(0)
    # One token reads whole rows. Several share a part that stays in a cache, each of them in the same order.
    across, along = (last - first, columns) if stop - start == 1 else (BLOCK_ACROSS, BLOCK_ALONG)
    for begin in range(first, last, max(across, 1)):
        end = min(begin + across, last)
        for top in range(0, columns, along):
            for p in range(start, stop):
                x, result = carray(_f32(of[5] + p * of[6]), columns), carray(_f32(of[7] + p * of[8]), last)[begin:end]
                for c in range(top, min(top + along, columns)):
                    row, scale = matrix[c * rows + begin : c * rows + end], x[c]
                    for r in range(len(result)):
                        result[r] += _single(row[r]) * scale


def _single(value: Any) -> Any:
    """A weight, of float32 or of bf16 as uint16, as float32."""
    return value if isinstance(value, np.float32) else widened(value)


@overload(_single, inline="always")
def _single_by_type(value):  # type: ignore[no-untyped-def]
    if value is types.float32:
        return lambda value: value
    return lambda value: widened(value)


def results(pairs: int, rows: int) -> torch.Tensor:
    """Uninitialised memory for results, float32 [pairs, rows].

    Its rows are padded by a cache line: `rows` is often a multiple of a power of two, and at such strides the writes of
    many pairs would compete for the same few lines of the cache.
    """
    return torch.empty(1, rows) if pairs == 1 else torch.empty(pairs, rows + CACHE_LINE)[:, :rows]


class RowKernel(NamedTuple):
    """A loop over row-major matrices, and what it takes."""

    loop: Native
    inputs: torch.dtype
    """The dtype of `x`."""


def row_kernel(dtype: torch.dtype, columns: int) -> RowKernel | None:
    """The kernel for matrices [rows, columns] of `dtype`; None when there is none."""
    if dtype is torch.bfloat16 and columns % PairsOfBf16.values == 0 and PairsOfBf16.available():
        return RowKernel(grouped_gemv_bf16_pairs, torch.bfloat16)
    if dtype is torch.float16 and not Widened.available("f16"):
        return None
    loops = {torch.bfloat16: grouped_gemv_bf16, torch.float16: grouped_gemv_f16, torch.float32: grouped_gemv_f32}
    return RowKernel(loops[dtype], torch.float32) if dtype in loops else None


def transposed_kernel(dtype: torch.dtype) -> RowKernel | None:
    """The kernel for matrices of `dtype` that are stored [columns, rows]; None when there is none."""
    loops = {torch.bfloat16: gemv_transposed_bf16, torch.float32: gemv_transposed_f32}
    return RowKernel(loops[dtype], torch.float32) if dtype in loops else None
