"""GEMV kernels for CPUs over packed weights with inputs of 16-bit integers, and the rounding to these.

Each format has functions of its own, since numba keeps compiled code by function. Sums have one order: batch-invariant.
"""

from __future__ import annotations

from edgemoe.cache.compiled import Native
from edgemoe.kernels.cpu.packed.int16_codes import codes_of
from edgemoe.kernels.cpu.packed.int16_dots import int16_dots
from edgemoe.kernels.cpu.packed.int16_inputs import rounding

_q8_0 = int16_dots(codes_of("Q8_0"))
_q4_0 = int16_dots(codes_of("Q4_0"))
_q5_0 = int16_dots(codes_of("Q5_0"))
_q2_k = int16_dots(codes_of("Q2_K"))
_q3_k = int16_dots(codes_of("Q3_K"))
_q4_k = int16_dots(codes_of("Q4_K"))
_q5_k = int16_dots(codes_of("Q5_K"))
_q6_k = int16_dots(codes_of("Q6_K"))
_rounded_bytes = rounding(codes_of("Q8_0").layout)
_rounded_q2_k = rounding(codes_of("Q2_K").layout)
_rounded_q3_k = rounding(codes_of("Q3_K").layout)
_rounded_q4_k = rounding(codes_of("Q4_K").layout)
_rounded_q5_k = rounding(codes_of("Q5_K").layout)
_rounded_q6_k = rounding(codes_of("Q6_K").layout)


@Native
def int16_q8_0(job, scratch, first, last):  # type: ignore[no-untyped-def]
    """out[p, r] = W(slot of p)[r] · x[p] for the rows first ≤ r < last.

    `job` is the address of an `arrays.Job`: the pairs `starts[i]` ≤ p < `starts[i + 1]` belong to `slots[i]`. `x` holds
    the tokens of `rounded_bytes`, of `columns` columns, and `out` is float32 [pairs, rows]. `scratch` is not used.
    """
    _q8_0(job, scratch, first, last)


@Native
def int16_q4_0(job, scratch, first, last):  # type: ignore[no-untyped-def]
    """See `int16_q8_0`."""
    _q4_0(job, scratch, first, last)


@Native
def int16_q5_0(job, scratch, first, last):  # type: ignore[no-untyped-def]
    """See `int16_q8_0`."""
    _q5_0(job, scratch, first, last)


@Native
def int16_q2_k(job, scratch, first, last):  # type: ignore[no-untyped-def]
    """See `int16_q8_0`."""
    _q2_k(job, scratch, first, last)


@Native
def int16_q3_k(job, scratch, first, last):  # type: ignore[no-untyped-def]
    """See `int16_q8_0`."""
    _q3_k(job, scratch, first, last)


@Native
def int16_q4_k(job, scratch, first, last):  # type: ignore[no-untyped-def]
    """See `int16_q8_0`."""
    _q4_k(job, scratch, first, last)


@Native
def int16_q5_k(job, scratch, first, last):  # type: ignore[no-untyped-def]
    """See `int16_q8_0`."""
    _q5_k(job, scratch, first, last)


@Native
def int16_q6_k(job, scratch, first, last):  # type: ignore[no-untyped-def]
    """See `int16_q8_0`."""
    _q6_k(job, scratch, first, last)


@Native
def rounded_bytes(job, scratch, first, last):  # type: ignore[no-untyped-def]
    """Rounds the rows first ≤ r < last of `x`, float32 [rows, columns], to 16-bit integers (`int16_inputs.Layout`).

    `job` is the address of `row_kernels.Words`, of which `out` are tokens one after the other. `scratch` is not used.
    """
    _rounded_bytes(job, scratch, first, last)


@Native
def rounded_q2_k(job, scratch, first, last):  # type: ignore[no-untyped-def]
    """See `rounded_bytes`."""
    _rounded_q2_k(job, scratch, first, last)


@Native
def rounded_q3_k(job, scratch, first, last):  # type: ignore[no-untyped-def]
    """See `rounded_bytes`."""
    _rounded_q3_k(job, scratch, first, last)


@Native
def rounded_q4_k(job, scratch, first, last):  # type: ignore[no-untyped-def]
    """See `rounded_bytes`."""
    _rounded_q4_k(job, scratch, first, last)


@Native
def rounded_q5_k(job, scratch, first, last):  # type: ignore[no-untyped-def]
    """See `rounded_bytes`."""
    _rounded_q5_k(job, scratch, first, last)


@Native
def rounded_q6_k(job, scratch, first, last):  # type: ignore[no-untyped-def]
    """See `rounded_bytes`."""
    _rounded_q6_k(job, scratch, first, last)
