"""What the loaders of all formats have in common: fields of words, small floats by their bits, values of groups.

A loader is called as load(record, tables, rows, first, BLOCK, META) and gives the tile float32 [R, BLOCK] of a matrix:
of the rows `rows`, int32 [R] in any order, and of the columns from `first` on, an existing one and a multiple of BLOCK.
`record` points to the first byte of a record that is aligned to 16 bytes, `tables` to what `TileFormat.tables` holds.
META begins with the matrix' number of rows and of columns; what lies beyond them is 0. Loaders read whole words where
they can, since a memory instruction for each value costs more than the few bits that it brings.

Numbers of float formats are integers in META (see `NUMBERS`). Floats are decoded by their bits, which works on cards
that lack the type, and is exact.
"""

# Triton reads the annotations of a kernel as part of it: only what is fixed when it is compiled has one.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import torch

from edgemoe.kernels.triton.language import constexpr, tl, triton

NUMBERS = {
    torch.float32: 0,
    torch.float16: 1,
    torch.bfloat16: 2,
    torch.float8_e4m3fn: 3,
    torch.float8_e5m2: 4,
    torch.float8_e8m0fnu: 5,
}
"""What stands for a float dtype in META."""


def _bytes_of(words, UNIT: constexpr):
    """The bytes of words of UNIT bytes, int32 [..., n]: int32 [..., UNIT n], the lowest first."""
    if UNIT == 4:
        words = tl.interleave(words, words >> 16)
    if UNIT >= 2:
        words = tl.interleave(words, words >> 8)
    return words & 255


def _fields(words, BITS: constexpr):
    """The fields of BITS bits, 2, 4 or 8, of int32 words [..., n]: int32 [..., 32 / BITS n], the lowest first."""
    words = tl.interleave(words, words >> 16)
    words = tl.interleave(words, words >> 8)
    if BITS <= 4:
        words = tl.interleave(words, words >> 4)
    if BITS == 2:
        words = tl.interleave(words, words >> 2)
    return words & ((1 << BITS) - 1)


def _whole(codes, LESS: constexpr):
    """codes - LESS in float32, for int32 0 ≤ codes < 2^22.

    By an addition, since cards convert at a quarter of its rate: a float32 from 2^23 on ends with the integer's bits.
    """
    return (codes | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + LESS)


def _e4m3(codes):
    """Float32 of the bytes of e4m3 floats, int32 0 ≤ codes < 256: as a float16 whose exponent is 8 less."""
    bits = ((codes & 127) << 7) | ((codes & 128) << 8)
    values = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where((codes & 127) == 127, float("nan"), values)


def _e5m2(codes):
    """Float32 of the bytes of e5m2 floats, int32 0 ≤ codes < 256: the upper half of a float16."""
    return (codes << 8).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


def _e2m1(codes):
    """2^-14 of the codes of e2m1 floats, int32 0 ≤ codes < 16, in float32: by the bits of a float16."""
    bits = ((codes & 7) << 9) | ((codes & 8) << 12)
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


def _e2m1_factors(exponents):
    """Two factors for `e2m1` that make of it the value times 2^(exponents - 127), for int32 0 ≤ exponents < 256.

    One alone may be too large for a float32, or too small for all of its bits.
    """
    smaller = exponents >> 1
    one = ((smaller + 77) << 23).to(tl.float32, bitcast=True)
    return one, ((exponents - smaller + 64) << 23).to(tl.float32, bitcast=True)


def _wide_bf16(bits):
    """Float32 of the bits of bf16 floats, int16."""
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


def _rounded_to(values, NUMBER: constexpr):
    """The nearest floats to float32 `values` in one of the first three of `NUMBERS`, in float32; ties to even."""
    if NUMBER == 1:
        values = values.to(tl.float16).to(tl.float32)
    elif NUMBER == 2:
        # Triton's interpreter does not round to bf16. What is no number must not be carried into the sign.
        bits = tl.where(values == values, values.to(tl.int32, bitcast=True), 0x7FC00000)
        values = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return values


def _floats(start, at, NUMBER: constexpr):
    """Float32 of the numbers `at` of an array that begins at `start`, of the dtype of `NUMBERS`."""
    if NUMBER == 0:
        values = tl.load(start.to(tl.pointer_type(tl.float32)) + at)
    elif NUMBER == 1:
        values = tl.load(start.to(tl.pointer_type(tl.float16)) + at).to(tl.float32)
    elif NUMBER == 2:
        values = wide_bf16(tl.load(start.to(tl.pointer_type(tl.int16)) + at))
    elif NUMBER == 3:
        values = e4m3(tl.load(start + at).to(tl.int32))
    elif NUMBER == 4:
        values = e5m2(tl.load(start + at).to(tl.int32))
    else:
        # The smallest power is subnormal; the largest exponent stands for no number.
        exponents = tl.load(start + at).to(tl.int32)
        bits = tl.where(exponents == 0, 0x400000, tl.where(exponents == 255, 0x7FC00000, exponents << 23))
        values = bits.to(tl.float32, bitcast=True)
    return values


def _groups(first, GROUP: constexpr, COLUMNS: constexpr, BLOCK: constexpr):
    """The groups of GROUP columns that a tile has to do with, int32 [1, BLOCK / GROUP or BLOCK]; see `spread`."""
    if GROUP >= COLUMNS:
        found = tl.arange(0, 1)
    elif GROUP % BLOCK == 0:
        found = first // GROUP + tl.arange(0, 1)
    elif BLOCK % GROUP == 0:
        found = first // GROUP + tl.arange(0, BLOCK // GROUP)
    else:
        found = (first + tl.arange(0, BLOCK)) // GROUP
    if COLUMNS % BLOCK != 0:
        found = tl.minimum(found, (COLUMNS - 1) // GROUP)
    return found[None, :]


def _spread(values, BLOCK: constexpr):
    """What belongs to each column of a tile, [R, BLOCK], of what belongs to each of its groups, [R, n]."""
    ROWS: constexpr = values.shape[0]
    COUNT: constexpr = values.shape[1]
    if COUNT != BLOCK:
        wide = tl.broadcast_to(values[:, :, None], (ROWS, COUNT, BLOCK // COUNT))
        values = tl.reshape(wide, (ROWS, BLOCK))
    return values


def _looked_up(table, codes):
    """The entries `codes`, int32 [R, n, m] or [R, m], of the 16 float32 at `table`."""
    flat = tl.reshape(codes, (codes.numel,))
    return tl.reshape(tl.gather(tl.load(table + tl.arange(0, 16)), flat, 0), codes.shape)


def _words(start, rows, first, WORDS: constexpr, PER: constexpr, COLUMNS: constexpr, BLOCK: constexpr):
    """The int32 words of a tile, [R, BLOCK / PER], of rows of WORDS words that hold PER values each."""
    at = tl.multiple_of(first // PER + tl.arange(0, BLOCK // PER), BLOCK // PER)
    place = start.to(tl.pointer_type(tl.int32)) + rows[:, None] * WORDS + at[None, :]
    return tl.load(place) if COLUMNS % BLOCK == 0 else tl.load(place, mask=(at < WORDS)[None, :], other=0)


def _octets(start, rows, first, COLUMNS: constexpr, BLOCK: constexpr):
    """The bytes of a tile, int32 [R, BLOCK], of rows of COLUMNS bytes."""
    at = first + tl.arange(0, BLOCK)
    place = start + rows[:, None] * COLUMNS + at[None, :]
    found = tl.load(place) if COLUMNS % BLOCK == 0 else tl.load(place, mask=(at < COLUMNS)[None, :], other=0)
    return found.to(tl.int32)


def _inside(tile, rows, first, ROWS: constexpr, COLUMNS: constexpr, BLOCK: constexpr):
    """`tile`, with 0 beyond the last row and column."""
    keep = (rows < ROWS)[:, None]
    if COLUMNS % BLOCK != 0:
        keep = keep & (first + tl.arange(0, BLOCK) < COLUMNS)[None, :]
    return tl.where(keep, tile, 0.0)


bytes_of = triton.jit(_bytes_of)
fields = triton.jit(_fields)
whole = triton.jit(_whole)
e4m3 = triton.jit(_e4m3)
e5m2 = triton.jit(_e5m2)
e2m1 = triton.jit(_e2m1)
e2m1_factors = triton.jit(_e2m1_factors)
wide_bf16 = triton.jit(_wide_bf16)
rounded_to = triton.jit(_rounded_to)
floats = triton.jit(_floats)
groups = triton.jit(_groups)
spread = triton.jit(_spread)
looked_up = triton.jit(_looked_up)
words = triton.jit(_words)
octets = triton.jit(_octets)
inside = triton.jit(_inside)
