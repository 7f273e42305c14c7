"""Loaders of GGUF's types with values of their own; see `gguf_parts`. The arithmetic is that of `formats.gguf_blocks`.

The compiler may join a product and a difference, which rounds once where two roundings are meant: in Q4_1, Q5_1, Q2_K,
Q4_K and Q5_K, unless a kernel is compiled with `enable_fp_fusion=False`.
"""

# Triton reads the annotations of a kernel as part of it: only what is fixed when it is compiled has one.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from edgemoe.kernels.triton.gguf_parts import (
    blocks,
    by_half,
    half,
    halves,
    octet,
    pieces,
    short,
    tile,
    units,
    word,
)
from edgemoe.kernels.triton.language import constexpr, tl, triton
from edgemoe.kernels.triton.tile_parts import bytes_of, e2m1, e2m1_factors, looked_up, whole


def _q4_0(record, tables, rows, first, BLOCK: constexpr, META: constexpr):
    start = record + META[2]
    block, _ = blocks(rows, first, 32, BLOCK, META)
    steps = half(start, block, 18, 0)
    return tile(steps[:, :, None] * whole(halves(start, block, 2, 18, 2), 8), rows, first, BLOCK, META)


def _q4_1(record, tables, rows, first, BLOCK: constexpr, META: constexpr):
    start = record + META[2]
    block, _ = blocks(rows, first, 32, BLOCK, META)
    steps, lowest = half(start, block, 20, 0), half(start, block, 20, 2)
    values = steps[:, :, None] * whole(halves(start, block, 4, 20, 4), 0) + lowest[:, :, None]
    return tile(values, rows, first, BLOCK, META)


def _fifth_bits(high):
    """Bit i of words [R, n] for value i, as 16 or 0: int32 [R, n, 32]."""
    return ((high[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1) << 4


def _q5_0(record, tables, rows, first, BLOCK: constexpr, META: constexpr):
    start = record + META[2]
    block, _ = blocks(rows, first, 32, BLOCK, META)
    codes = halves(start, block, 6, 22, 2) | fifth_bits(word(start, block, 2, 22))
    return tile(half(start, block, 22, 0)[:, :, None] * whole(codes, 16), rows, first, BLOCK, META)


def _q5_1(record, tables, rows, first, BLOCK: constexpr, META: constexpr):
    start = record + META[2]
    block, _ = blocks(rows, first, 32, BLOCK, META)
    codes = halves(start, block, 8, 24, 4) | fifth_bits(word(start, block, 4, 24))
    steps, lowest = half(start, block, 24, 0), half(start, block, 24, 2)
    return tile(steps[:, :, None] * whole(codes, 0) + lowest[:, :, None], rows, first, BLOCK, META)


def _q8_0(record, tables, rows, first, BLOCK: constexpr, META: constexpr):
    start = record + META[2]
    block, _ = blocks(rows, first, 32, BLOCK, META)
    # A signed byte with its sign turned is 128 more, unsigned.
    codes = bytes_of(units(start, block, 2, 32, 34, 2), 2) ^ 128
    return tile(half(start, block, 34, 0)[:, :, None] * whole(codes, 128), rows, first, BLOCK, META)


def _iq4_nl(record, tables, rows, first, BLOCK: constexpr, META: constexpr):
    """`tables` has the 16 values."""
    start = record + META[2]
    block, _ = blocks(rows, first, 32, BLOCK, META)
    values = looked_up(tables, halves(start, block, 2, 18, 2))
    return tile(half(start, block, 18, 0)[:, :, None] * values, rows, first, BLOCK, META)


def _mxfp4_block(record, tables, rows, first, BLOCK: constexpr, META: constexpr):
    start = record + META[2]
    block, _ = blocks(rows, first, 32, BLOCK, META)
    codes = halves(start, block, 1, 17, 1)
    one, other = e2m1_factors(octet(start, block, 0, 17))
    # ggml has no negative zero.
    values = tl.where(codes == 8, 0.0, e2m1(codes)) * one[:, :, None] * other[:, :, None]
    return tile(values, rows, first, BLOCK, META)


def _q2_k(record, tables, rows, first, BLOCK: constexpr, META: constexpr):
    start = record + META[2]
    block, part = blocks(rows, first, 256, BLOCK, META)
    values = whole(pieces(start, block, 16 + part // 4 * 32, part % 4 * 2, 32, 3, 84, 4), 0)
    scales = short(start, block, 2 * part, 84)
    step, least = half(start, block, 84, 80), half(start, block, 84, 82)
    steps = by_half(step * whole(scales & 15, 0), step * whole((scales >> 8) & 15, 0))
    lowest = by_half(least * whole((scales >> 4) & 15, 0), least * whole(scales >> 12, 0))
    return tile(steps * values - lowest, rows, first, BLOCK, META)


def _q3_k(record, tables, rows, first, BLOCK: constexpr, META: constexpr):
    start = record + META[2]
    block, part = blocks(rows, first, 256, BLOCK, META)
    low = pieces(start, block, 32 + part // 4 * 32, part % 4 * 2, 32, 3, 110, 2)
    high = pieces(start, block, part * 0, part, 32, 1, 110, 2)
    values = whole(low | (high << 2), 4)
    # Scale j of 16 has four bits in byte j % 8, and two in one of the four bytes behind these.
    low = (short(start, block, 96 + part % 4 * 2, 110) >> (part // 4 * 4)) & 0xF0F
    high = (short(start, block, 104 + part % 2 * 2, 110) >> (part // 2 * 2)) & 0x303
    scales = low | (high << 4)
    step = half(start, block, 110, 108)
    steps = by_half(step * whole(scales & 255, 32), step * whole(scales >> 8, 32))
    return tile(steps * values, rows, first, BLOCK, META)


def _with_minima(start, block, part, values, BYTES: constexpr):
    """`values` [R, n, 32] with the scales and minima of six bits of Q4_K and Q5_K."""
    one = octet(start, block, 4 + part % 4, BYTES)
    two = octet(start, block, 8 + part % 4, BYTES)
    three = octet(start, block, 12 + part % 4, BYTES)
    scales = tl.where(part < 4, one & 63, (three & 15) | ((one >> 6) << 4))
    minima = tl.where(part < 4, two & 63, (three >> 4) | ((two >> 6) << 4))
    steps = half(start, block, BYTES, 0) * whole(scales, 0)
    lowest = half(start, block, BYTES, 2) * whole(minima, 0)
    return steps[:, :, None] * values - lowest[:, :, None]


def _q4_k(record, tables, rows, first, BLOCK: constexpr, META: constexpr):
    start = record + META[2]
    block, part = blocks(rows, first, 256, BLOCK, META)
    values = whole(pieces(start, block, 16 + part // 2 * 32, part % 2 * 4, 32, 15, 144, 4), 0)
    return tile(with_minima(start, block, part, values, 144), rows, first, BLOCK, META)


def _q5_k(record, tables, rows, first, BLOCK: constexpr, META: constexpr):
    start = record + META[2]
    block, part = blocks(rows, first, 256, BLOCK, META)
    low = pieces(start, block, 48 + part // 2 * 32, part % 2 * 4, 32, 15, 176, 4)
    high = pieces(start, block, 16 + part * 0, part, 32, 1, 176, 4)
    values = whole(low | (high << 4), 0)
    return tile(with_minima(start, block, part, values, 176), rows, first, BLOCK, META)


def _q6_k(record, tables, rows, first, BLOCK: constexpr, META: constexpr):
    start = record + META[2]
    block, part = blocks(rows, first, 256, BLOCK, META)
    low = pieces(start, block, part // 4 * 64 + part % 2 * 32, part % 4 // 2 * 4, 32, 15, 210, 2)
    high = pieces(start, block, 128 + part // 4 * 32, part % 4 * 2, 32, 3, 210, 2)
    values = whole(low | (high << 4), 32)
    scales = short(start, block, 192 + 2 * part, 210) ^ 0x8080
    step = half(start, block, 210, 208)
    steps = by_half(step * whole(scales & 255, 128), step * whole(scales >> 8, 128))
    return tile(steps * values, rows, first, BLOCK, META)


def _iq4_xs(record, tables, rows, first, BLOCK: constexpr, META: constexpr):
    """`tables` has the 16 values."""
    start = record + META[2]
    block, part = blocks(rows, first, 256, BLOCK, META)
    low = (octet(start, block, 4 + part // 2, 136) >> (part % 2 * 4)) & 15
    high = (short(start, block, 2, 136) >> (part * 2)) & 3
    steps = half(start, block, 136, 0) * whole(low | (high << 4), 32)
    values = looked_up(tables, halves(start, block, 8 + part * 16, 136, 4))
    return tile(steps[:, :, None] * values, rows, first, BLOCK, META)


fifth_bits = triton.jit(_fifth_bits)
with_minima = triton.jit(_with_minima)
q4_0 = triton.jit(_q4_0)
q4_1 = triton.jit(_q4_1)
q5_0 = triton.jit(_q5_0)
q5_1 = triton.jit(_q5_1)
q8_0 = triton.jit(_q8_0)
iq4_nl = triton.jit(_iq4_nl)
mxfp4_block = triton.jit(_mxfp4_block)
q2_k = triton.jit(_q2_k)
q3_k = triton.jit(_q3_k)
q4_k = triton.jit(_q4_k)
q5_k = triton.jit(_q5_k)
q6_k = triton.jit(_q6_k)
iq4_xs = triton.jit(_iq4_xs)
