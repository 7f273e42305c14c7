"""Loaders of floats, of small floats with scales, and of bitsandbytes' 4-bit codes of floats.

See `tile_parts` for what a loader is. META is told at each loader; a place is the byte offset of a part, a number of a
dtype one of `NUMBERS`.
"""

# Triton reads the annotations of a kernel as part of it: only what is fixed when it is compiled has one.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from edgemoe.kernels.triton.language import constexpr, tl, triton
from edgemoe.kernels.triton.tile_parts import (
    e2m1,
    e2m1_factors,
    e4m3,
    e5m2,
    fields,
    floats,
    groups,
    inside,
    looked_up,
    octets,
    spread,
    wide_bf16,
    words,
)


def _wide(start, at, keep, NUMBER: constexpr):
    """Float32 of the numbers `at` of the array at `start`, and 0 where they are not to be kept."""
    if NUMBER == 0:
        values = tl.load(start.to(tl.pointer_type(tl.float32)) + at, mask=keep, other=0.0)
    elif NUMBER == 1:
        values = tl.load(start.to(tl.pointer_type(tl.float16)) + at, mask=keep, other=0.0).to(tl.float32)
    else:
        values = wide_bf16(tl.load(start.to(tl.pointer_type(tl.int16)) + at, mask=keep, other=0))
    return values


def _kept(rows, first, BLOCK: constexpr, META: constexpr):
    """Which values of a tile the matrix has, and the columns of the tile, [BLOCK]."""
    column = first + tl.arange(0, BLOCK)
    keep = (rows < META[0])[:, None]
    if META[1] % BLOCK != 0:
        keep = keep & (column < META[1])[None, :]
    return keep, column


kept = triton.jit(_kept)


def _by_rows(record, tables, rows, first, BLOCK: constexpr, META: constexpr):
    """`FloatFormat`, [rows, columns]. META: rows, columns, the place, the number of the dtype."""
    keep, column = kept(rows, first, BLOCK, META)
    return wide(record + META[2], rows[:, None] * META[1] + column[None, :], keep, META[3])


def _by_columns(record, tables, rows, first, BLOCK: constexpr, META: constexpr):
    """`FloatFormat`, [columns, rows]. META: as `by_rows`."""
    keep, column = kept(rows, first, BLOCK, META)
    return wide(record + META[2], column[None, :] * META[0] + rows[:, None], keep, META[3])


def _fp8(record, tables, rows, first, BLOCK: constexpr, META: constexpr):
    """`Fp8Format`. META: rows, columns, two places, the sides of a block, numbers of the scales and of the values."""
    ROWS: constexpr = META[0]
    COLUMNS: constexpr = META[1]
    HEIGHT: constexpr = META[4]
    WIDTH: constexpr = META[5]
    row = tl.minimum(rows, ROWS - 1)
    codes = octets(record + META[2], row, first, COLUMNS, BLOCK)
    values = e4m3(codes) if META[7] == 3 else e5m2(codes)
    at = (row // HEIGHT)[:, None] * ((COLUMNS + WIDTH - 1) // WIDTH) + groups(first, WIDTH, COLUMNS, BLOCK)
    scales = floats(record + META[3], at, META[6])
    return inside(values * spread(scales, BLOCK), rows, first, ROWS, COLUMNS, BLOCK)


def _mxfp4(record, tables, rows, first, BLOCK: constexpr, META: constexpr):
    """`Mxfp4Format`. META: rows, columns, the places of codes and exponents."""
    ROWS: constexpr = META[0]
    COLUMNS: constexpr = META[1]
    row = tl.minimum(rows, ROWS - 1)
    values = e2m1(fields(words(record + META[2], row, first, COLUMNS // 8, 8, COLUMNS, BLOCK), 4))
    at = row[:, None] * (COLUMNS // 32) + groups(first, 32, COLUMNS, BLOCK)
    one, other = e2m1_factors(tl.load(record + META[3] + at).to(tl.int32))
    return inside(values * spread(one, BLOCK) * spread(other, BLOCK), rows, first, ROWS, COLUMNS, BLOCK)


def _nvfp4(record, tables, rows, first, BLOCK: constexpr, META: constexpr):
    """`Nvfp4Format`. META: rows, columns, the places of codes, scales and factor, whether the factor divides."""
    ROWS: constexpr = META[0]
    COLUMNS: constexpr = META[1]
    row = tl.minimum(rows, ROWS - 1)
    values = e2m1(fields(words(record + META[2], row, first, COLUMNS // 8, 8, COLUMNS, BLOCK), 4))
    scales = floats(record + META[3], row[:, None] * (COLUMNS // 16) + groups(first, 16, COLUMNS, BLOCK), 3)
    factor = tl.load((record + META[4]).to(tl.pointer_type(tl.float32)))
    # A plain division is not exact on a card.
    scales = tl.div_rn(scales, tl.zeros_like(scales) + factor) if META[5] else scales * factor
    return inside(values * 16384.0 * spread(scales, BLOCK), rows, first, ROWS, COLUMNS, BLOCK)


def _bnb_codes(start, row, first, COLUMNS: constexpr, BLOCK: constexpr):
    """The codes of bitsandbytes of a tile, int32 [R, BLOCK]: in each byte, the higher one comes first."""
    if COLUMNS % 8 == 0:
        packed = words(start, row, first, COLUMNS // 8, 8, COLUMNS, BLOCK)
        octet = tl.interleave(packed, packed >> 16)
        octet = tl.interleave(octet, octet >> 8)
        codes = tl.interleave(octet >> 4, octet) & 15
    else:
        value = row[:, None] * COLUMNS + tl.minimum(first + tl.arange(0, BLOCK), COLUMNS - 1)[None, :]
        codes = (tl.load(start + value // 2).to(tl.int32) >> (4 - 4 * (value % 2))) & 15
    return codes


def _bnb_four_bit(record, tables, rows, first, BLOCK: constexpr, META: constexpr):
    """`BnbFourBitFormat`. META: rows, columns, the places of codes, maxima and table, the values of a block."""
    ROWS: constexpr = META[0]
    COLUMNS: constexpr = META[1]
    SIZE: constexpr = META[5]
    row = tl.minimum(rows, ROWS - 1)
    codes = bnb_codes(record + META[2], row, first, COLUMNS, BLOCK)
    values = looked_up((record + META[4]).to(tl.pointer_type(tl.float32)), codes)
    if COLUMNS % SIZE == 0:
        at = row[:, None] * (COLUMNS // SIZE) + groups(first, SIZE, COLUMNS, BLOCK)
    else:
        # Blocks begin anywhere in a row.
        column = tl.minimum(first + tl.arange(0, BLOCK), COLUMNS - 1)
        at = (row[:, None] * COLUMNS + column[None, :]) // SIZE
    maxima = floats(record + META[3], at, 0)
    return inside(values * spread(maxima, BLOCK), rows, first, ROWS, COLUMNS, BLOCK)


wide = triton.jit(_wide)
by_rows = triton.jit(_by_rows)
by_columns = triton.jit(_by_columns)
fp8 = triton.jit(_fp8)
mxfp4 = triton.jit(_mxfp4)
nvfp4 = triton.jit(_nvfp4)
bnb_codes = triton.jit(_bnb_codes)
bnb_four_bit = triton.jit(_bnb_four_bit)
