"""RMS norms of the rows of a matrix on CPUs: one call for what takes PyTorch seven. Sums are float32, in one order."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgemoe.cache.compiled import compiled

_options: dict[str, Any] = {
    "nogil": True,
    "fastmath": {"reassoc", "contract", "nsz"},
    "boundscheck": False,
    "error_model": "numpy",
}


@compiled(**_options)
def rms_norm_bf16(x, weight, epsilon, rounds, out):  # type: ignore[no-untyped-def]
    """out = x / sqrt(mean of x² + epsilon) * weight, row by row.

    `x` and `out` are bf16 as uint16 [rows, columns]; `weight` is float32 [columns], and `epsilon` float32. With
    `rounds` the quotient is rounded to bf16 before it is multiplied by the weight.
    """
    rows, columns = x.shape
    for r in range(rows):
        total = np.float32(0)
        for c in range(columns):
            value = np.uint32(np.uint32(x[r, c]) << np.uint32(16)).view(np.float32)
            total += value * value
        scale = np.float32(1) / np.sqrt(total / np.float32(columns) + epsilon)
        for c in range(columns):
            value = np.uint32(np.uint32(x[r, c]) << np.uint32(16)).view(np.float32) * scale
            if rounds:
                value = np.uint32(_rounded(value) << np.uint32(16)).view(np.float32)
            out[r, c] = np.uint16(_rounded(value * weight[c]))


@compiled(**_options)
def _rounded(value):  # type: ignore[no-untyped-def]
    """The bits of the bf16 next to the float32 `value`, ties to even; a NaN stays one."""
    bits = np.float32(value).view(np.uint32)
    if value != value:
        return np.uint32((bits >> np.uint32(16)) | np.uint32(64))
    return np.uint32((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@compiled(**_options)
def rms_norm_f32(x, weight, epsilon, rounds, out):  # type: ignore[no-untyped-def]
    """As `rms_norm_bf16` for float32, where nothing is rounded in between."""
    rows, columns = x.shape
    for r in range(rows):
        total = np.float32(0)
        for c in range(columns):
            total += x[r, c] * x[r, c]
        scale = np.float32(1) / np.sqrt(total / np.float32(columns) + epsilon)
        for c in range(columns):
            out[r, c] = x[r, c] * scale * weight[c]
