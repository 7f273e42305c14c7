"""Loaders of integers with scales: compressed-tensors' groups, GPTQ's and AWQ's, bitsandbytes' 8-bit rows.

See `tile_parts` for what a loader is. META is told at each loader; a place is the byte offset of a part.
"""

# Triton reads the annotations of a kernel as part of it: only what is fixed when it is compiled has one.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from edgemoe.kernels.triton.language import constexpr, tl, triton
from edgemoe.kernels.triton.tile_parts import (
    fields,
    floats,
    groups,
    inside,
    octets,
    rounded_to,
    spread,
    whole,
    words,
)


def _group_numbers(record, first, GROUP: constexpr, ORDER: constexpr, COLUMNS: constexpr, BLOCK: constexpr):
    """The groups of a tile's columns, int32 [1, n]; from the part at ORDER, one a column, unless that is negative."""
    if ORDER >= 0:
        column = tl.minimum(first + tl.arange(0, BLOCK), COLUMNS - 1)
        found = tl.load((record + ORDER).to(tl.pointer_type(tl.int32)) + column)[None, :]
    else:
        found = groups(first, GROUP, COLUMNS, BLOCK)
    return found


def _int_groups(record, tables, rows, first, BLOCK: constexpr, META: constexpr):
    """`IntGroupFormat`.

    META: rows, columns, the places of values, scales, zero points and group numbers (-1 where there are none), bits,
    columns of a group, number of the scales' dtype.
    """
    ROWS: constexpr = META[0]
    COLUMNS: constexpr = META[1]
    BITS: constexpr = META[6]
    GROUP: constexpr = META[7]
    PER: constexpr = 32 // BITS
    GROUPS: constexpr = (COLUMNS + GROUP - 1) // GROUP
    row = tl.minimum(rows, ROWS - 1)
    codes = fields(words(record + META[2], row, first, (COLUMNS + PER - 1) // PER, PER, COLUMNS, BLOCK), BITS)
    group = group_numbers(record, first, GROUP, META[5], COLUMNS, BLOCK)
    scales = spread(floats(record + META[3], row[:, None] * GROUPS + group, META[8]), BLOCK)
    if META[4] >= 0:
        packed = tl.load((record + META[4]).to(tl.pointer_type(tl.int32)) + (row // PER)[:, None] * GROUPS + group)
        zeros = (packed >> (row % PER * BITS)[:, None]) & ((1 << BITS) - 1)
        values = whole(codes - spread(zeros, BLOCK) + (1 << BITS), 1 << BITS)
    else:
        values = whole(codes, 1 << (BITS - 1))
    return inside(rounded_to(values * scales, META[8]), rows, first, ROWS, COLUMNS, BLOCK)


def _gptq(record, tables, rows, first, BLOCK: constexpr, META: constexpr):
    """`GptqFormat`, but for AWQ's order.

    META: rows, columns, the places of values, zero points, scales and group numbers (-1 where there are none), bits,
    columns of a group, what is added to zero points, number of the scales' dtype.
    """
    ROWS: constexpr = META[0]
    COLUMNS: constexpr = META[1]
    BITS: constexpr = META[6]
    PER: constexpr = 32 // BITS
    MASK: constexpr = (1 << BITS) - 1
    at = first // PER + tl.arange(0, BLOCK // PER)
    place = (record + META[2]).to(tl.pointer_type(tl.int32)) + at[None, :] * ROWS + rows[:, None]
    # Rows, which lie side by side, are not limited to existing ones: that they follow one another would be lost.
    packed = tl.load(place, mask=(rows < ROWS)[:, None] & (at < COLUMNS // PER)[None, :], other=0)
    row = tl.minimum(rows, ROWS - 1)
    group = group_numbers(record, first, META[7], META[5], COLUMNS, BLOCK)
    lines = (record + META[3]).to(tl.pointer_type(tl.int32)) + group * (ROWS // PER)
    zeros = ((tl.load(lines + (row // PER)[:, None]) >> (row % PER * BITS)[:, None]) & MASK) + META[8]
    if META[8] != 0:
        # In GPTQ's first layout the largest zero point is kept as the smallest field.
        zeros = zeros & MASK
    scales = floats(record + META[4], group * ROWS + row[:, None], META[9])
    values = whole(fields(packed, BITS) - spread(zeros, BLOCK) + 2 * MASK, 2 * MASK)
    return inside(values * spread(scales, BLOCK), rows, first, ROWS, COLUMNS, BLOCK)


def _awq(record, tables, rows, first, BLOCK: constexpr, META: constexpr):
    """`GptqFormat` in AWQ's order, with 4 bits. META: as `gptq`."""
    ROWS: constexpr = META[0]
    COLUMNS: constexpr = META[1]
    row = tl.minimum(rows, ROWS - 1)
    # Of a word's fields, the first four belong to the even rows, the others to the odd ones.
    shift = (((row % 8) // 2 + row % 2 * 4) * 4)[:, None]
    column = tl.minimum(first + tl.arange(0, BLOCK), COLUMNS - 1)
    group = group_numbers(record, first, META[7], META[5], COLUMNS, BLOCK)
    line = (row // 8)[:, None]
    packed = tl.load((record + META[2]).to(tl.pointer_type(tl.int32)) + column[None, :] * (ROWS // 8) + line)
    zeros = (tl.load((record + META[3]).to(tl.pointer_type(tl.int32)) + group * (ROWS // 8) + line) >> shift) & 15
    zeros = zeros + META[8]
    if META[8] != 0:
        zeros = zeros & 15
    scales = floats(record + META[4], group * ROWS + row[:, None], META[9])
    values = whole(((packed >> shift) & 15) - spread(zeros, BLOCK) + 32, 32)
    return inside(values * spread(scales, BLOCK), rows, first, ROWS, COLUMNS, BLOCK)


def _bnb_int8(record, tables, rows, first, BLOCK: constexpr, META: constexpr):
    """`BnbInt8Format`. META: rows, columns, the places of values and of the rows' maxima."""
    ROWS: constexpr = META[0]
    COLUMNS: constexpr = META[1]
    row = tl.minimum(rows, ROWS - 1)
    # A signed byte with its sign turned is 128 more, unsigned.
    values = whole(octets(record + META[2], row, first, COLUMNS, BLOCK) ^ 128, 128)
    maxima = spread(floats(record + META[3], row[:, None], 0), BLOCK)
    # bitsandbytes multiplies by the rounded reciprocal of 127.
    return inside(values * maxima * 7.874015718698502e-3, rows, first, ROWS, COLUMNS, BLOCK)


group_numbers = triton.jit(_group_numbers)
int_groups = triton.jit(_int_groups)
gptq = triton.jit(_gptq)
awq = triton.jit(_awq)
bnb_int8 = triton.jit(_bnb_int8)
