"""What the loaders of GGUF's types share: places in blocks, and pieces of blocks. See `tile_parts` for loaders.

A tile is read in groups of 32 columns, of which a block has one or eight: a tensor [R, n] has an entry for each row and
group, and the values are [R, n, 32] before they become [R, BLOCK]. META: rows, columns, the byte offset
of the part. BYTES are those of a block, UNIT is 1, 2 or 4: bytes that are read at a time, of which a block and
everything in it is a multiple.
"""

# Triton reads the annotations of a kernel as part of it: only what is fixed when it is compiled has one.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from edgemoe.kernels.triton.language import constexpr, tl, triton
from edgemoe.kernels.triton.tile_parts import bytes_of, groups, inside


def _blocks(rows, first, VALUES: constexpr, BLOCK: constexpr, META: constexpr):
    """For each row and group, the number of its block of VALUES values, [R, n], and its own in the block, [1, n]."""
    ROWS: constexpr = META[0]
    COLUMNS: constexpr = META[1]
    group = groups(first, 32, COLUMNS, BLOCK)
    row = tl.minimum(rows, ROWS - 1)
    return row[:, None] * (COLUMNS // VALUES) + group // (VALUES // 32), group % (VALUES // 32)


def _half(start, block, BYTES: constexpr, AT: constexpr):
    """The fp16 at byte AT of each block, float32 [R, n]."""
    return tl.load(start.to(tl.pointer_type(tl.float16)) + block * (BYTES // 2) + AT // 2).to(tl.float32)


def _octet(start, block, at, BYTES: constexpr):
    """The byte `at` of each block, int32 [R, n]."""
    return tl.load(start + block * BYTES + at).to(tl.int32)


def _short(start, block, at, BYTES: constexpr):
    """The 16 bits at byte `at` of each block, int32 [R, n] ≥ 0."""
    found = tl.load(start.to(tl.pointer_type(tl.int16)) + block * (BYTES // 2) + at // 2)
    return found.to(tl.int32) & 0xFFFF


def _word(start, block, at, BYTES: constexpr):
    """The 32 bits at byte `at` of each block, int32 [R, n], where a block is a multiple of two bytes."""
    return short(start, block, at, BYTES) | (short(start, block, at + 2, BYTES) << 16)


def _units(start, block, at, COUNT: constexpr, BYTES: constexpr, UNIT: constexpr):
    """The bytes from `at` on, COUNT in all, of each block, as int32 [R, n, COUNT / UNIT]. See `bytes_of`."""
    place = (block * (BYTES // UNIT) + at // UNIT)[:, :, None] + tl.arange(0, COUNT // UNIT)[None, None, :]
    if UNIT == 4:
        found = tl.load(start.to(tl.pointer_type(tl.int32)) + place)
    elif UNIT == 2:
        found = tl.load(start.to(tl.pointer_type(tl.int16)) + place).to(tl.int32)
    else:
        found = tl.load(start + place).to(tl.int32)
    return found


def _pieces(start, block, at, shift, COUNT: constexpr, MASK: constexpr, BYTES: constexpr, UNIT: constexpr):
    """Fields of the COUNT bytes from `at` on of each block: shifted to the right by `shift`, [1, n], and masked.

    int32 [R, n, COUNT]; MASK leaves nothing of what is shifted in from the next byte.
    """
    return bytes_of(units(start, block, at, COUNT, BYTES, UNIT) >> shift[:, :, None], UNIT) & MASK


def _halves(start, block, at, BYTES: constexpr, UNIT: constexpr):
    """32 values of four bits of the 16 bytes from `at` on, int32 [R, n, 32]: all low halves, then the high ones."""
    low = bytes_of(units(start, block, at, 16, BYTES, UNIT), UNIT)
    both = tl.permute(tl.join(low & 15, low >> 4), (0, 1, 3, 2))
    return tl.reshape(both, (low.shape[0], low.shape[1], 32))


def _by_half(first_half, second_half):
    """What belongs to each of 32 columns, [R, n, 32], of what belongs to 16 of them, [R, n] each."""
    return tl.where((tl.arange(0, 32) < 16)[None, None, :], first_half[:, :, None], second_half[:, :, None])


def _tile(values, rows, first, BLOCK: constexpr, META: constexpr):
    """Values [R, n, 32] as a tile [R, BLOCK], with 0 beyond the matrix."""
    return inside(tl.reshape(values, (values.shape[0], BLOCK)), rows, first, META[0], META[1], BLOCK)


blocks = triton.jit(_blocks)
half = triton.jit(_half)
octet = triton.jit(_octet)
short = triton.jit(_short)
word = triton.jit(_word)
units = triton.jit(_units)
pieces = triton.jit(_pieces)
halves = triton.jit(_halves)
by_half = triton.jit(_by_half)
tile = triton.jit(_tile)
