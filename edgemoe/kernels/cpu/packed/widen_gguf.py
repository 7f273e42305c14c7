"""How compiled code reads the packed types of GGUF: the float32 values of one block, as `formats.gguf_blocks` has them.

Every function puts the values of the block at the address `block`, an LLVM value, in their order. Where a scale is
multiplied by a code and something is added, the product is exact in float32, so that one rounding is the same as two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

from edgemoe.formats.gguf_blocks import IQ4, MXFP4
from edgemoe.kernels.cpu.vector_ir import (
    BYTE,
    INT,
    SINGLE,
    field,
    high_nibbles,
    joined,
    load,
    load_byte,
    load_bytes,
    load_halves,
    looked_up,
    low_nibbles,
    multiply_add,
    of_codes,
    offset,
    same,
    signed_floats,
    splat,
    split_nibbles,
    spread,
    unsigned_floats,
)

Put = Callable[[int, Any], None]
"""Takes the number of a value and a vector of float32, a multiple of 16: the values from this one on."""
EmitBlock = Callable[[Any, Any, Put], None]
"""Of a builder, a block's address, and what takes its values."""


def halves(builder: Any, address: Any) -> Any:
    """The 32 codes of 16 bytes: the low halves, then the high ones."""
    packed = load_bytes(builder, address, 16)
    return joined(builder, low_nibbles(builder, packed), high_nibbles(builder, packed))


def _put_all(put: Put, first: int, found: Sequence[Any]) -> None:
    """Puts vectors of 16 values one after the other, from number `first` on."""
    for number, values in enumerate(found):
        put(first + 16 * number, values)


def first(builder: Any, block: Any, count: int) -> Any:
    """The fp16 that a block begins with, `count` times."""
    return spread(builder, load_halves(builder, block), [0], count)


def _first_two(builder: Any, address: Any, count: int) -> tuple[Any, Any]:
    """Both fp16 at `address`, `count` times each."""
    halves = load_halves(builder, address)
    return spread(builder, halves, [0], count), spread(builder, halves, [1], count)


def _last(builder: Any, block: Any, at: int, count: int) -> Any:
    """The fp16 that a block ends with, `at` bytes from its beginning, `count` times."""
    return spread(builder, load_halves(builder, offset(builder, block, at - 2)), [1], count)


# --- one scale for 32 values ---------------------------------------------------------------------------


def _q4_0(builder: Any, block: Any, put: Put) -> None:
    step = first(builder, block, 16)

    def make(codes: Any) -> Any:
        return builder.fmul(step, builder.fsub(codes, same(codes, 8.0)))

    _put_all(put, 0, of_codes(builder, make, split_nibbles(builder, offset(builder, block, 2))))


def _q4_1(builder: Any, block: Any, put: Put) -> None:
    step, low = _first_two(builder, block, 16)

    def make(codes: Any) -> Any:
        return multiply_add(builder, step, codes, low)

    _put_all(put, 0, of_codes(builder, make, split_nibbles(builder, offset(builder, block, 4))))


def five_bits(builder: Any, address: Any) -> Any:
    """32 codes of five bits as bytes: the highest lie in the four bytes at `address`, before the others."""
    low = halves(builder, offset(builder, address, 4))
    bits = builder.bitcast(load(builder, address, INT, align=1), ir.VectorType(ir.IntType(1), 32))
    return builder.or_(low, builder.select(bits, same(low, 16), same(low, 0)))


def _q5_0(builder: Any, block: Any, put: Put) -> None:
    values = unsigned_floats(builder, five_bits(builder, offset(builder, block, 2)))
    put(0, builder.fmul(first(builder, block, 32), builder.fsub(values, same(values, 16.0))))


def _q5_1(builder: Any, block: Any, put: Put) -> None:
    step, low = _first_two(builder, block, 32)
    put(0, multiply_add(builder, step, unsigned_floats(builder, five_bits(builder, offset(builder, block, 4))), low))


def _q8_0(builder: Any, block: Any, put: Put) -> None:
    values = signed_floats(builder, load_bytes(builder, offset(builder, block, 2), 32))
    put(0, builder.fmul(first(builder, block, 32), values))


def _iq4_nl(builder: Any, block: Any, put: Put) -> None:
    _put_from_table(builder, IQ4, first(builder, block, 16), offset(builder, block, 2), put, 0)


def _mxfp4(builder: Any, block: Any, put: Put) -> None:
    exponent = builder.zext(load_byte(builder, block), INT)
    # 2 to the exponent - 128, the smallest two of which are subnormal; the table has twice the values.
    normal = builder.shl(builder.sub(exponent, INT(1)), INT(23))
    small = builder.shl(INT(0x00200000), exponent)
    bits = builder.select(builder.icmp_unsigned("<", exponent, INT(2)), small, normal)
    step = splat(builder, builder.bitcast(bits, SINGLE), 16)
    _put_from_table(builder, MXFP4, step, offset(builder, block, 1), put, 0)


def _put_from_table(builder: Any, table: Sequence[float], step: Any, address: Any, put: Put, first: int) -> None:
    """`step`, a vector, times the values of `table` that the 32 codes in the 16 bytes at `address` name."""
    own = builder.fmul(step, ir.Constant(step.type, list(table)))
    _put_all(put, first, [looked_up(builder, own, codes) for codes in split_nibbles(builder, address)])


# --- 256 values with scales of their own for every 16 or 32 ----------------------------------------------


def _with_scales(builder: Any, scales: Any, number: int, values: Any) -> Any:
    """32 `values` times their `scales`, a vector with one for each 16 of the block; they begin at 32 * `number`."""
    return builder.fmul(spread(builder, scales, (2 * number, 2 * number + 1), 16), values)


def q2_scales(builder: Any, block: Any) -> tuple[Any, Any]:
    """The scale of each 16 values of Q2_K, and what is added to each 16."""
    packed_scales = load_bytes(builder, block, 16)
    step, low = _first_two(builder, offset(builder, block, 80), 16)
    steps = builder.fmul(step, unsigned_floats(builder, low_nibbles(builder, packed_scales)))
    lows = builder.fmul(builder.fneg(low), unsigned_floats(builder, high_nibbles(builder, packed_scales)))
    return steps, lows


def _q2_k(builder: Any, block: Any, put: Put) -> None:
    steps, lows = q2_scales(builder, block)
    for half in range(2):
        packed = load_bytes(builder, offset(builder, block, 16 + 32 * half), 32)
        for shift in range(4):
            number = 4 * half + shift
            values = unsigned_floats(builder, field(builder, packed, 2 * shift, 3))
            step, lowest = (spread(builder, each, (2 * number, 2 * number + 1), 16) for each in (steps, lows))
            put(32 * number, multiply_add(builder, step, values, lowest))


def _q3_k(builder: Any, block: Any, put: Put) -> None:
    present, scales = load_bytes(builder, block, 32), q3_scales(builder, block)
    for half in range(2):
        packed = load_bytes(builder, offset(builder, block, 32 + 32 * half), 32)
        for shift in range(4):
            number = 4 * half + shift
            absent = builder.xor(field(builder, present, number, 1), same(present, 1))
            codes = builder.sub(field(builder, packed, 2 * shift, 3), builder.shl(absent, same(absent, 2)))
            put(32 * number, _with_scales(builder, scales, number, signed_floats(builder, codes)))


def q3_scales(builder: Any, block: Any) -> Any:
    """Scales of six bits: the lower four in eight bytes, low halves first, and the upper two in four more."""
    packed = load_bytes(builder, offset(builder, block, 96), 8)
    four = joined(builder, low_nibbles(builder, packed), high_nibbles(builder, packed))
    words = splat(builder, load(builder, offset(builder, block, 104), INT, align=1), 4)
    upper = builder.lshr(words, ir.Constant(words.type, [0, 2, 4, 6]))
    two = builder.bitcast(builder.and_(upper, same(upper, 0x03030303)), four.type)
    codes = builder.sub(builder.or_(four, builder.shl(two, same(two, 4))), same(four, 32))
    return builder.fmul(_last(builder, block, 108, 16), signed_floats(builder, codes))


def steps_and_lows(builder: Any, block: Any) -> Any:
    """The scale of each 32 values of Q4_K and Q5_K, then what is added to each 32: 16 float32.

    They have six bits each: the first four of both are bytes, in whose upper bits the upper two of the others lie.
    """
    scales, lows, others = (load(builder, offset(builder, block, at), INT, align=1) for at in (4, 8, 12))

    def lowest(packed: Any) -> Any:
        return builder.and_(packed, INT(0x3F3F3F3F))

    def last(packed: Any, four: Any) -> Any:
        two = builder.and_(builder.lshr(packed, INT(2)), INT(0x30303030))
        return builder.or_(builder.and_(four, INT(0x0F0F0F0F)), two)

    words = ir.Constant(ir.VectorType(INT, 4), ir.Undefined)
    found = lowest(scales), last(scales, others), lowest(lows), last(lows, builder.lshr(others, INT(4)))
    for at, word in enumerate(found):
        words = builder.insert_element(words, word, INT(at))
    codes = unsigned_floats(builder, builder.bitcast(words, ir.VectorType(BYTE, 16)))
    step, low = _first_two(builder, block, 8)
    return builder.fmul(joined(builder, step, builder.fneg(low)), codes)


def _q4_k(builder: Any, block: Any, put: Put) -> None:
    scales = steps_and_lows(builder, block)
    for pair in range(4):
        halves = [split_nibbles(builder, offset(builder, block, 16 + 32 * pair + at)) for at in (0, 16)]
        for side in range(2):
            number = 2 * pair + side
            step, low = (spread(builder, scales, [at], 16) for at in (number, 8 + number))

            def make(codes: Any, step: Any = step, low: Any = low) -> Any:
                return multiply_add(builder, step, codes, low)

            _put_all(put, 32 * number, of_codes(builder, make, [half[side] for half in halves]))


def _q5_k(builder: Any, block: Any, put: Put) -> None:
    scales, high = steps_and_lows(builder, block), load_bytes(builder, offset(builder, block, 16), 32)
    for pair in range(4):
        packed = load_bytes(builder, offset(builder, block, 48 + 32 * pair), 32)
        for side, codes in enumerate((low_nibbles(builder, packed), high_nibbles(builder, packed))):
            number = 2 * pair + side
            bit = field(builder, high, number, 1)
            values = unsigned_floats(builder, builder.or_(codes, builder.shl(bit, same(bit, 4))))
            step, low = (spread(builder, scales, [at], 32) for at in (number, 8 + number))
            put(32 * number, multiply_add(builder, step, values, low))


def q6_scales(builder: Any, block: Any) -> Any:
    """The scale of each 16 values of Q6_K."""
    codes = signed_floats(builder, load_bytes(builder, offset(builder, block, 192), 16))
    return builder.fmul(_last(builder, block, 208, 16), codes)


def _q6_k(builder: Any, block: Any, put: Put) -> None:
    scales = q6_scales(builder, block)
    for half in range(2):
        low = [load_bytes(builder, offset(builder, block, 64 * half + 32 * side), 32) for side in range(2)]
        high = load_bytes(builder, offset(builder, block, 128 + 32 * half), 32)
        for part in range(4):
            four = low_nibbles(builder, low[part]) if part < 2 else high_nibbles(builder, low[part - 2])
            two = field(builder, high, 2 * part, 3)
            codes = builder.sub(builder.or_(four, builder.shl(two, same(two, 4))), same(four, 32))
            number = 4 * half + part
            put(32 * number, _with_scales(builder, scales, number, signed_floats(builder, codes)))


def _iq4_xs(builder: Any, block: Any, put: Put) -> None:
    low = splat(builder, load(builder, offset(builder, block, 4), INT, align=1), 8)
    four = builder.and_(builder.lshr(low, ir.Constant(low.type, list(range(0, 32, 4)))), same(low, 15))
    half = load(builder, offset(builder, block, 2), ir.IntType(16), align=1)
    high = splat(builder, builder.zext(half, INT), 8)
    two = builder.and_(builder.lshr(high, ir.Constant(high.type, list(range(0, 16, 2)))), same(high, 3))
    codes = builder.sub(builder.or_(four, builder.shl(two, same(two, 4))), same(four, 32))
    scales = builder.fmul(first(builder, block, 8), signed_floats(builder, codes))
    for number in range(8):
        own = spread(builder, scales, [number], 16)
        _put_from_table(builder, IQ4, own, offset(builder, block, 8 + 16 * number), put, 32 * number)


EMITTED: dict[str, EmitBlock] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0, "Q2_K": _q2_k, "Q3_K": _q3_k,
    "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k, "IQ4_NL": _iq4_nl, "IQ4_XS": _iq4_xs, "MXFP4": _mxfp4,
}  # fmt: skip
"""The function of each packed type that there is code for. The types of large tables (IQ2, IQ3) have none."""
