"""Norms and activations of the rows of a matrix on CPUs: one call for what takes PyTorch six or seven operations.

Sums are float32, in one order.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgemoe.cache.compiled import compiled
from edgemoe.kernels.cpu.vector_ir import EXPONENTIAL, SMALLEST

_in_order: dict[str, Any] = {
    "nogil": True,
    "fastmath": {"contract", "nsz"},
    "boundscheck": False,
    "error_model": "numpy",
}
_options = _in_order | {"fastmath": {"reassoc", "contract", "nsz"}}


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
                value = nearest_bf16(value)
            out[r, c] = np.uint16(rounded_to_bf16(value * weight[c]))


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


@compiled(**_in_order)
def gated_silu_f32(x, step, out, first, last):  # type: ignore[no-untyped-def]
    """out = silu(gate) * up, for the rows first ≤ p < last of `out`, [pairs, columns].

    `x` is float32, one-dimensional: from p * `step` on a row's gate, then its up, of `columns` values each.
    """
    columns = out.shape[1]
    for p in range(first, last):
        values = out[p]
        gates, ups = _halves(x, p * step, columns)
        for c in range(columns):
            values[c] = gates[c] * _sigmoid(gates[c]) * ups[c]


@compiled(**_in_order)
def gated_silu_bf16(x, step, out, first, last):  # type: ignore[no-untyped-def]
    """As `gated_silu_f32` with every value rounded to bf16 as PyTorch's operations round; `out` is uint16."""
    columns = out.shape[1]
    for p in range(first, last):
        values = out[p]
        gates, ups = _halves(x, p * step, columns)
        for c in range(columns):
            gate, up = nearest_bf16(gates[c]), nearest_bf16(ups[c])
            values[c] = np.uint16(rounded_to_bf16(nearest_bf16(gate * _sigmoid(gate)) * up))


@compiled(**_in_order)
def _halves(x, start, columns):  # type: ignore[no-untyped-def]
    """The first `columns` values from `start` on, and the next ones."""
    return x[start : start + columns], x[start + columns : start + 2 * columns]


@compiled(**_in_order)
def _sigmoid(x):  # type: ignore[no-untyped-def]
    """1 / (1 + e to the power of -x), by an exponential that is never large."""
    small = exponential(-abs(x))
    return (np.float32(1) if x >= np.float32(0) else small) / (np.float32(1) + small)


@compiled(**_in_order)
def rounded_to_bf16(value):  # type: ignore[no-untyped-def]
    """The bits of the bf16 next to the float32 `value`, ties to even; a NaN stays one."""
    bits = np.float32(value).view(np.uint32)
    if value != value:
        return np.uint32((bits >> np.uint32(16)) | np.uint32(64))
    return np.uint32((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@compiled(**_in_order)
def nearest_bf16(value):  # type: ignore[no-untyped-def]
    """The bf16 next to a float32, as a float32."""
    return np.uint32(rounded_to_bf16(value) << np.uint32(16)).view(np.float32)


@compiled(**_in_order)
def exponential(x):  # type: ignore[no-untyped-def]
    """As `vector_ir.exponential`, of one float32."""
    x = max(x, np.float32(SMALLEST))
    twos = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    r = x - twos * np.float32(0.693359375) - twos * np.float32(-2.12194440e-4)
    y = np.float32(EXPONENTIAL[0])
    for at in range(1, len(EXPONENTIAL)):
        y = y * r + np.float32(EXPONENTIAL[at])
    y = y * r * r + r + np.float32(1)
    return y * np.int32((np.int32(twos) + np.int32(127)) << np.int32(23)).view(np.float32)
