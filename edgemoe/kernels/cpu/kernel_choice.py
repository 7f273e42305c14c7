"""Which kernels multiply matrices of plain floats: those that widen them, or those for AVX512-BF16, or PyTorch's."""

from __future__ import annotations

import torch

from edgemoe.formats.float_format import FloatFormat
from edgemoe.kernels.cpu.packed import packed_matrix
from edgemoe.kernels.cpu.packed.packed_matrix import PackedMatrix
from edgemoe.kernels.cpu.slot_matrix import SlotMatrix

USUAL_COLUMNS = 64
"""A width that every kernel takes."""


def widens(dtype: torch.dtype, columns: int) -> bool:
    """Whether matrices of `dtype` are best widened to float32 and multiplied as packed ones are, for any tokens.

    Where the CPU has AVX512-BF16, it multiplies bf16 as it is, and PyTorch's products of many tokens are fast.
    """
    # Imported late: importing numba is slow.
    from edgemoe.kernels.cpu.dot_block import PairsOfBf16

    as_it_is = dtype is torch.bfloat16 and PairsOfBf16.available()
    return not as_it_is and packed_matrix.fits(FloatFormat(dtype), columns)


def few_tokens(dtype: torch.dtype) -> int:
    """Tokens up to which a kernel multiplies most matrices of `dtype`; 0 without a kernel."""
    if widens(dtype, USUAL_COLUMNS):
        return PackedMatrix.max_tokens
    return SlotMatrix.most_tokens(dtype) if SlotMatrix.fits(dtype, USUAL_COLUMNS) else 0
