"""GEMV kernels for CPUs over packed weights: rows are widened to float32 in a cache of the CPU and multiplied there.

Each format has a function, since numba keeps compiled code by function. All have the arguments of `gguf_q8_0`, and sums
of one order, that of `gemv_kernels.grouped_gemv_f32`: batch-invariant.
"""

from __future__ import annotations

from edgemoe.cache.compiled import Native
from edgemoe.kernels.cpu.packed.packed_dots import packed_dots
from edgemoe.kernels.cpu.packed.widening import Floats, FourBits, Fp8, Gguf, GroupsOfInt4, Mxfp4, Nvfp4, RowsOfInt8

_floats_bf16 = packed_dots(Floats("bf16"))
_floats_f16 = packed_dots(Floats("f16"))
_floats_f32 = packed_dots(Floats("f32"))
_gguf_q4_0 = packed_dots(Gguf("Q4_0"))
_gguf_q4_1 = packed_dots(Gguf("Q4_1"))
_gguf_q5_0 = packed_dots(Gguf("Q5_0"))
_gguf_q5_1 = packed_dots(Gguf("Q5_1"))
_gguf_q8_0 = packed_dots(Gguf("Q8_0"))
_gguf_q2_k = packed_dots(Gguf("Q2_K"))
_gguf_q3_k = packed_dots(Gguf("Q3_K"))
_gguf_q4_k = packed_dots(Gguf("Q4_K"))
_gguf_q5_k = packed_dots(Gguf("Q5_K"))
_gguf_q6_k = packed_dots(Gguf("Q6_K"))
_gguf_iq4_nl = packed_dots(Gguf("IQ4_NL"))
_gguf_iq4_xs = packed_dots(Gguf("IQ4_XS"))
_gguf_mxfp4 = packed_dots(Gguf("MXFP4"))
_four_bits = packed_dots(FourBits())
_rows_of_int8 = packed_dots(RowsOfInt8())
_int4_0_bf16 = packed_dots(GroupsOfInt4(0, "bf16"))
_int4_0_f16 = packed_dots(GroupsOfInt4(0, "f16"))
_int4_32_bf16 = packed_dots(GroupsOfInt4(32, "bf16"))
_int4_32_f16 = packed_dots(GroupsOfInt4(32, "f16"))
_int4_64_bf16 = packed_dots(GroupsOfInt4(64, "bf16"))
_int4_64_f16 = packed_dots(GroupsOfInt4(64, "f16"))
_int4_128_bf16 = packed_dots(GroupsOfInt4(128, "bf16"))
_int4_128_f16 = packed_dots(GroupsOfInt4(128, "f16"))
_mxfp4 = packed_dots(Mxfp4())
_nvfp4_divided = packed_dots(Nvfp4(divides=True))
_nvfp4_multiplied = packed_dots(Nvfp4(divides=False))
_fp8_blocks_f32 = packed_dots(Fp8((128, 128), "f32"))
_fp8_blocks_bf16 = packed_dots(Fp8((128, 128), "bf16"))
_fp8_rows_f32 = packed_dots(Fp8((1, 0), "f32"))
_fp8_rows_bf16 = packed_dots(Fp8((1, 0), "bf16"))
_fp8_one_f32 = packed_dots(Fp8((0, 0), "f32"))
_fp8_one_bf16 = packed_dots(Fp8((0, 0), "bf16"))


@Native
def gguf_q8_0(job, tile, first, last):  # type: ignore[no-untyped-def]
    """out[p, r] = W(slot of p)[r] · x[p] for the rows first ≤ r < last.

    `job` is the address of an `arrays.Job`: the pairs `starts[i]` ≤ p < `starts[i + 1]` belong to `slots[i]`. `x` is
    float32 [pairs, columns], and `out` float32 [pairs, rows]. `tile` is the address of `packed_dots.tile_values`
    float32, which are overwritten. Without pairs the rows of `slots[0]` are widened to it, [last - first, columns].
    """
    _gguf_q8_0(job, tile, first, last)


@Native
def gguf_q4_0(job, tile, first, last):  # type: ignore[no-untyped-def]
    """See `gguf_q8_0`."""
    _gguf_q4_0(job, tile, first, last)


@Native
def gguf_q4_1(job, tile, first, last):  # type: ignore[no-untyped-def]
    """See `gguf_q8_0`."""
    _gguf_q4_1(job, tile, first, last)


@Native
def gguf_q5_0(job, tile, first, last):  # type: ignore[no-untyped-def]
    """See `gguf_q8_0`."""
    _gguf_q5_0(job, tile, first, last)


@Native
def gguf_q5_1(job, tile, first, last):  # type: ignore[no-untyped-def]
    """See `gguf_q8_0`."""
    _gguf_q5_1(job, tile, first, last)


@Native
def gguf_q2_k(job, tile, first, last):  # type: ignore[no-untyped-def]
    """See `gguf_q8_0`."""
    _gguf_q2_k(job, tile, first, last)


@Native
def gguf_q3_k(job, tile, first, last):  # type: ignore[no-untyped-def]
    """See `gguf_q8_0`."""
    _gguf_q3_k(job, tile, first, last)


@Native
def gguf_q4_k(job, tile, first, last):  # type: ignore[no-untyped-def]
    """See `gguf_q8_0`."""
    _gguf_q4_k(job, tile, first, last)


@Native
def gguf_q5_k(job, tile, first, last):  # type: ignore[no-untyped-def]
    """See `gguf_q8_0`."""
    _gguf_q5_k(job, tile, first, last)


@Native
def gguf_q6_k(job, tile, first, last):  # type: ignore[no-untyped-def]
    """See `gguf_q8_0`."""
    _gguf_q6_k(job, tile, first, last)


@Native
def gguf_iq4_nl(job, tile, first, last):  # type: ignore[no-untyped-def]
    """See `gguf_q8_0`."""
    _gguf_iq4_nl(job, tile, first, last)


@Native
def gguf_iq4_xs(job, tile, first, last):  # type: ignore[no-untyped-def]
    """See `gguf_q8_0`."""
    _gguf_iq4_xs(job, tile, first, last)


@Native
def gguf_mxfp4(job, tile, first, last):  # type: ignore[no-untyped-def]
    """See `gguf_q8_0`."""
    _gguf_mxfp4(job, tile, first, last)


@Native
def four_bits(job, tile, first, last):  # type: ignore[no-untyped-def]
    """See `gguf_q8_0`."""
    _four_bits(job, tile, first, last)


@Native
def rows_of_int8(job, tile, first, last):  # type: ignore[no-untyped-def]
    """See `gguf_q8_0`."""
    _rows_of_int8(job, tile, first, last)


@Native
def int4_0_bf16(job, tile, first, last):  # type: ignore[no-untyped-def]
    """See `gguf_q8_0`."""
    _int4_0_bf16(job, tile, first, last)


@Native
def int4_0_f16(job, tile, first, last):  # type: ignore[no-untyped-def]
    """See `gguf_q8_0`."""
    _int4_0_f16(job, tile, first, last)


@Native
def int4_32_bf16(job, tile, first, last):  # type: ignore[no-untyped-def]
    """See `gguf_q8_0`."""
    _int4_32_bf16(job, tile, first, last)


@Native
def int4_32_f16(job, tile, first, last):  # type: ignore[no-untyped-def]
    """See `gguf_q8_0`."""
    _int4_32_f16(job, tile, first, last)


@Native
def int4_64_bf16(job, tile, first, last):  # type: ignore[no-untyped-def]
    """See `gguf_q8_0`."""
    _int4_64_bf16(job, tile, first, last)


@Native
def int4_64_f16(job, tile, first, last):  # type: ignore[no-untyped-def]
    """See `gguf_q8_0`."""
    _int4_64_f16(job, tile, first, last)


@Native
def int4_128_bf16(job, tile, first, last):  # type: ignore[no-untyped-def]
    """See `gguf_q8_0`."""
    _int4_128_bf16(job, tile, first, last)


@Native
def int4_128_f16(job, tile, first, last):  # type: ignore[no-untyped-def]
    """See `gguf_q8_0`."""
    _int4_128_f16(job, tile, first, last)


@Native
def mxfp4(job, tile, first, last):  # type: ignore[no-untyped-def]
    """See `gguf_q8_0`."""
    _mxfp4(job, tile, first, last)


@Native
def nvfp4_divided(job, tile, first, last):  # type: ignore[no-untyped-def]
    """See `gguf_q8_0`."""
    _nvfp4_divided(job, tile, first, last)


@Native
def nvfp4_multiplied(job, tile, first, last):  # type: ignore[no-untyped-def]
    """See `gguf_q8_0`."""
    _nvfp4_multiplied(job, tile, first, last)


@Native
def fp8_blocks_f32(job, tile, first, last):  # type: ignore[no-untyped-def]
    """See `gguf_q8_0`."""
    _fp8_blocks_f32(job, tile, first, last)


@Native
def fp8_blocks_bf16(job, tile, first, last):  # type: ignore[no-untyped-def]
    """See `gguf_q8_0`."""
    _fp8_blocks_bf16(job, tile, first, last)


@Native
def fp8_rows_f32(job, tile, first, last):  # type: ignore[no-untyped-def]
    """See `gguf_q8_0`."""
    _fp8_rows_f32(job, tile, first, last)


@Native
def fp8_rows_bf16(job, tile, first, last):  # type: ignore[no-untyped-def]
    """See `gguf_q8_0`."""
    _fp8_rows_bf16(job, tile, first, last)


@Native
def fp8_one_f32(job, tile, first, last):  # type: ignore[no-untyped-def]
    """See `gguf_q8_0`."""
    _fp8_one_f32(job, tile, first, last)


@Native
def fp8_one_bf16(job, tile, first, last):  # type: ignore[no-untyped-def]
    """See `gguf_q8_0`."""
    _fp8_one_bf16(job, tile, first, last)


@Native
def floats_bf16(job, tile, first, last):  # type: ignore[no-untyped-def]
    """See `gguf_q8_0`."""
    _floats_bf16(job, tile, first, last)


@Native
def floats_f16(job, tile, first, last):  # type: ignore[no-untyped-def]
    """See `gguf_q8_0`."""
    _floats_f16(job, tile, first, last)


@Native
def floats_f32(job, tile, first, last):  # type: ignore[no-untyped-def]
    """See `gguf_q8_0`."""
    _floats_f32(job, tile, first, last)
