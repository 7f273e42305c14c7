"""Norms, activations and sums of rows on CPUs: one call for what takes PyTorch three to seven operations.

Sums are float32, in one order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import carray, types  # type: ignore[attr-defined]

from edgemoe.cache.compiled import Native, compiled
from edgemoe.kernels.cpu.vector_ir import EXPONENTIAL, SMALLEST, pointer_to

# Nothing is contracted: LLVM makes several versions of a loop, and might do it in some of them alone.
in_order: dict[str, Any] = {
    "nogil": True,
    "fastmath": {"nsz"},
    "boundscheck": False,
    "error_model": "numpy",
}
_sums = in_order | {"fastmath": {"reassoc", "contract", "nsz"}}

as_words, as_bf16, as_f32 = pointer_to(types.int64), pointer_to(types.uint16), pointer_to(types.float32)


class Words(NamedTuple):
    """What the kernels read at the address of their job, a word of 64 bits each. All rows are contiguous."""

    x: int
    """The address of the first row that is read."""
    x_step: int
    """Bytes from one row to the next."""
    out: int
    """The address of the first row that is written; the others follow at once."""
    columns: int
    """Values of such a row."""
    weights: int = 0
    """The address of factors."""
    epsilon: int = 0
    """The bits of a float32."""
    option: int = 0


COUNT = len(Words._fields)
X, X_STEP, OUT, COLUMNS, WEIGHTS, EPSILON, OPTION = range(COUNT)
"""The places of `Words`, for compiled code."""


@Native
def rms_norm_bf16(job, scratch, first, last):  # type: ignore[no-untyped-def]
    """out = x / sqrt(mean of x² + epsilon) * weight, for the rows first ≤ r < last; bf16, but weights of float32.

    With `option` the quotient is rounded to bf16 before it is multiplied by the weight. `scratch` is not used.
    """
    of = carray(as_words(job), COUNT)
    columns, epsilon = of[COLUMNS], np.uint32(of[EPSILON]).view(np.float32)
    weight = carray(as_f32(of[WEIGHTS]), columns)
    for r in range(first, last):
        x, out = carray(as_bf16(of[X] + r * of[X_STEP]), columns), carray(as_bf16(of[OUT] + 2 * r * columns), columns)
        norm_bf16(x, weight, epsilon, of[OPTION] != 0, out)


@Native
def rms_norm_f32(job, scratch, first, last):  # type: ignore[no-untyped-def]
    """As `rms_norm_bf16` for float32, where nothing is rounded in between."""
    of = carray(as_words(job), COUNT)
    columns, epsilon = of[COLUMNS], np.uint32(of[EPSILON]).view(np.float32)
    weight = carray(as_f32(of[WEIGHTS]), columns)
    for r in range(first, last):
        x, out = carray(as_f32(of[X] + r * of[X_STEP]), columns), carray(as_f32(of[OUT] + 4 * r * columns), columns)
        norm_f32(x, weight, epsilon, out)


@Native
def gated_silu_f32(job, scratch, first, last):  # type: ignore[no-untyped-def]
    """out = silu(gate) * up, for the rows first ≤ r < last; a row of `x` is a gate, then its up, of `columns` each."""
    of = carray(as_words(job), COUNT)
    columns = of[COLUMNS]
    for r in range(first, last):
        gates, ups = _halves(carray(as_f32(of[X] + r * of[X_STEP]), 2 * columns), columns)
        _gate_f32(gates, ups, carray(as_f32(of[OUT] + 4 * r * columns), columns))


@Native
def gated_silu_bf16(job, scratch, first, last):  # type: ignore[no-untyped-def]
    """As `gated_silu_f32` with every value rounded to bf16 as PyTorch's operations round; `out` is bf16."""
    of = carray(as_words(job), COUNT)
    columns = of[COLUMNS]
    for r in range(first, last):
        gates, ups = _halves(carray(as_f32(of[X] + r * of[X_STEP]), 2 * columns), columns)
        _gate_bf16(gates, ups, carray(as_bf16(of[OUT] + 2 * r * columns), columns))


@Native
def gated_silu_rounded(job, scratch, first, last):  # type: ignore[no-untyped-def]
    """As `gated_silu_bf16` with the rounded values as float32 in `out`."""
    of = carray(as_words(job), COUNT)
    columns = of[COLUMNS]
    for r in range(first, last):
        gates, ups = _halves(carray(as_f32(of[X] + r * of[X_STEP]), 2 * columns), columns)
        _gate_rounded(gates, ups, carray(as_f32(of[OUT] + 4 * r * columns), columns))


@Native
def gather_bf16(job, scratch, first, last):  # type: ignore[no-untyped-def]
    """out[r] = x[places[r]] for the rows first ≤ r < last, bf16; `weights` is the address of the places, int64."""
    of = carray(as_words(job), COUNT)
    for r in range(first, last):
        x = carray(as_bf16(of[X] + carray(as_words(of[WEIGHTS]), last)[r] * of[X_STEP]), of[COLUMNS])
        carray(as_bf16(of[OUT] + 2 * r * of[COLUMNS]), of[COLUMNS])[:] = x


@Native
def gather_f32(job, scratch, first, last):  # type: ignore[no-untyped-def]
    """As `gather_bf16` for float32."""
    of = carray(as_words(job), COUNT)
    for r in range(first, last):
        x = carray(as_f32(of[X] + carray(as_words(of[WEIGHTS]), last)[r] * of[X_STEP]), of[COLUMNS])
        carray(as_f32(of[OUT] + 4 * r * of[COLUMNS]), of[COLUMNS])[:] = x


@Native
def gather_widened(job, scratch, first, last):  # type: ignore[no-untyped-def]
    """As `gather_bf16` with the values as float32 in `out`."""
    of = carray(as_words(job), COUNT)
    for r in range(first, last):
        x = carray(as_bf16(of[X] + carray(as_words(of[WEIGHTS]), last)[r] * of[X_STEP]), of[COLUMNS])
        _widen_all(x, carray(as_f32(of[OUT] + 4 * r * of[COLUMNS]), of[COLUMNS]))


@Native
def scatter_bf16(job, scratch, first, last):  # type: ignore[no-untyped-def]
    """out[places[r]] = x[r] for the rows first ≤ r < last: float32, rounded to bf16; see `gather_bf16`."""
    of = carray(as_words(job), COUNT)
    for r in range(first, last):
        place = carray(as_words(of[WEIGHTS]), last)[r]
        round_all(
            carray(as_f32(of[X] + r * of[X_STEP]), of[COLUMNS]),
            carray(as_bf16(of[OUT] + 2 * place * of[COLUMNS]), of[COLUMNS]),
        )


@Native
def scatter_f32(job, scratch, first, last):  # type: ignore[no-untyped-def]
    """As `scatter_bf16` for float32."""
    of = carray(as_words(job), COUNT)
    for r in range(first, last):
        place = carray(as_words(of[WEIGHTS]), last)[r]
        carray(as_f32(of[OUT] + 4 * place * of[COLUMNS]), of[COLUMNS])[:] = carray(
            as_f32(of[X] + r * of[X_STEP]), of[COLUMNS]
        )


@Native
def add_bf16(job, scratch, first, last):  # type: ignore[no-untyped-def]
    """out = x + other, for the rows first ≤ r < last, bf16; `weights` is the address of the other's contiguous rows."""
    of = carray(as_words(job), COUNT)
    columns = of[COLUMNS]
    for r in range(first, last):
        x, other = (
            carray(as_bf16(of[X] + r * of[X_STEP]), columns),
            carray(as_bf16(of[WEIGHTS] + 2 * r * columns), columns),
        )
        _sum_bf16(x, other, carray(as_bf16(of[OUT] + 2 * r * columns), columns))


@Native
def add_f32(job, scratch, first, last):  # type: ignore[no-untyped-def]
    """As `add_bf16` for float32."""
    of = carray(as_words(job), COUNT)
    columns = of[COLUMNS]
    for r in range(first, last):
        x, other = (
            carray(as_f32(of[X] + r * of[X_STEP]), columns),
            carray(as_f32(of[WEIGHTS] + 4 * r * columns), columns),
        )
        _sum_f32(x, other, carray(as_f32(of[OUT] + 4 * r * columns), columns))


@Native
def weighted_sum_bf16(job, scratch, first, last):  # type: ignore[no-untyped-def]
    """out[r] = the sum of the rows of `x` from r * option on times their weights, `option` many, for first ≤ r < last.

    All bf16; products are rounded, as PyTorch's are. `scratch` is the address of `columns` float32.
    """
    of = carray(as_words(job), COUNT)
    columns, count = of[COLUMNS], of[OPTION]
    total = carray(as_f32(scratch), columns)
    for r in range(first, last):
        _clear(total)
        weights = carray(as_bf16(of[WEIGHTS] + 2 * r * count), count)
        for k in range(count):
            _add_rounded(carray(as_bf16(of[X] + (r * count + k) * of[X_STEP]), columns), widened(weights[k]), total)
        round_all(total, carray(as_bf16(of[OUT] + 2 * r * columns), columns))


@Native
def weighted_sum_bf16_by_f32(job, scratch, first, last):  # type: ignore[no-untyped-def]
    """As `weighted_sum_bf16` with weights of float32, and so are the products."""
    of = carray(as_words(job), COUNT)
    columns, count = of[COLUMNS], of[OPTION]
    total = carray(as_f32(scratch), columns)
    for r in range(first, last):
        _clear(total)
        weights = carray(as_f32(of[WEIGHTS] + 4 * r * count), count)
        for k in range(count):
            _add_bf16(carray(as_bf16(of[X] + (r * count + k) * of[X_STEP]), columns), weights[k], total)
        round_all(total, carray(as_bf16(of[OUT] + 2 * r * columns), columns))


@Native
def weighted_sum_f32(job, scratch, first, last):  # type: ignore[no-untyped-def]
    """As `weighted_sum_bf16` for float32."""
    of = carray(as_words(job), COUNT)
    columns, count = of[COLUMNS], of[OPTION]
    for r in range(first, last):
        total = carray(as_f32(of[OUT] + 4 * r * columns), columns)
        _clear(total)
        weights = carray(as_f32(of[WEIGHTS] + 4 * r * count), count)
        for k in range(count):
            _add_f32(carray(as_f32(of[X] + (r * count + k) * of[X_STEP]), columns), weights[k], total)


@compiled(**_sums)
def norm_bf16(x, weight, epsilon, rounds, out):  # type: ignore[no-untyped-def]
    """`rms_norm_bf16` of one row, as arrays."""
    columns = len(x)
    total = np.float32(0)
    for c in range(columns):
        value = widened(x[c])
        total += value * value
    scale = np.float32(1) / np.sqrt(total / np.float32(columns) + epsilon)
    for c in range(columns):
        value = widened(x[c]) * scale
        if rounds:
            value = nearest_bf16(value)
        out[c] = np.uint16(rounded_to_bf16(value * weight[c]))


@compiled(**_sums)
def norm_f32(x, weight, epsilon, out):  # type: ignore[no-untyped-def]
    """`rms_norm_f32` of one row, as arrays."""
    columns = len(x)
    total = np.float32(0)
    for c in range(columns):
        total += x[c] * x[c]
    scale = np.float32(1) / np.sqrt(total / np.float32(columns) + epsilon)
    for c in range(columns):
        out[c] = x[c] * scale * weight[c]


@compiled(**in_order)
def _gate_f32(gates, ups, out):  # type: ignore[no-untyped-def]
    for c in range(len(out)):
        out[c] = gates[c] * _sigmoid(gates[c]) * ups[c]


@compiled(**in_order)
def _gate_bf16(gates, ups, out):  # type: ignore[no-untyped-def]
    for c in range(len(out)):
        gate, up = nearest_bf16(gates[c]), nearest_bf16(ups[c])
        out[c] = np.uint16(rounded_to_bf16(nearest_bf16(gate * _sigmoid(gate)) * up))


@compiled(**in_order)
def _gate_rounded(gates, ups, out):  # type: ignore[no-untyped-def]
    for c in range(len(out)):
        gate, up = nearest_bf16(gates[c]), nearest_bf16(ups[c])
        out[c] = nearest_bf16(nearest_bf16(gate * _sigmoid(gate)) * up)


@compiled(**in_order)
def _halves(x, columns):  # type: ignore[no-untyped-def]
    """The first `columns` values of `x`, and the others."""
    return x[:columns], x[columns:]


@compiled(**in_order)
def _clear(values):  # type: ignore[no-untyped-def]
    # numba loses assignments of a number to a slice of an array that is made of an address.
    for c in range(len(values)):
        values[c] = np.float32(0)


@compiled(**in_order)
def _add_rounded(x, weight, total):  # type: ignore[no-untyped-def]
    for c in range(len(total)):
        total[c] += nearest_bf16(widened(x[c]) * weight)


@compiled(**in_order)
def _add_bf16(x, weight, total):  # type: ignore[no-untyped-def]
    for c in range(len(total)):
        total[c] += widened(x[c]) * weight


@compiled(**in_order)
def _add_f32(x, weight, total):  # type: ignore[no-untyped-def]
    for c in range(len(total)):
        total[c] += x[c] * weight


@compiled(**in_order)
def _sum_bf16(x, other, out):  # type: ignore[no-untyped-def]
    for c in range(len(out)):
        out[c] = np.uint16(rounded_to_bf16(widened(x[c]) + widened(other[c])))


@compiled(**in_order)
def _sum_f32(x, other, out):  # type: ignore[no-untyped-def]
    for c in range(len(out)):
        out[c] = x[c] + other[c]


@compiled(**in_order)
def round_all(values, out):  # type: ignore[no-untyped-def]
    """Float32 `values` as bf16, as uint16, in `out`."""
    for c in range(len(out)):
        out[c] = np.uint16(rounded_to_bf16(values[c]))


@compiled(**in_order)
def _widen_all(values, out):  # type: ignore[no-untyped-def]
    for c in range(len(out)):
        out[c] = widened(values[c])


@compiled(**in_order)
def widened(value):  # type: ignore[no-untyped-def]
    """A bf16, as uint16, as float32."""
    return np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32)


@compiled(**in_order)
def _sigmoid(x):  # type: ignore[no-untyped-def]
    """1 / (1 + e to the power of -x), by an exponential that is never large."""
    small = exponential(-abs(x))
    return (np.float32(1) if x >= np.float32(0) else small) / (np.float32(1) + small)


@compiled(**in_order)
def rounded_to_bf16(value):  # type: ignore[no-untyped-def]
    """The bits of the bf16 next to the float32 `value`, ties to even; a NaN stays one."""
    bits = np.float32(value).view(np.uint32)
    if value != value:
        return np.uint32((bits >> np.uint32(16)) | np.uint32(64))
    return np.uint32((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@compiled(**in_order)
def nearest_bf16(value):  # type: ignore[no-untyped-def]
    """The bf16 next to a float32, as a float32."""
    return np.uint32(rounded_to_bf16(value) << np.uint32(16)).view(np.float32)


@compiled(**in_order)
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
