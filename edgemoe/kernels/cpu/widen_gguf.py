"""How compiled code reads the packed types of GGUF: the float32 values of one block, as `formats.gguf_blocks` has them.

Every function stores the values of the block at the address `block` at `out`, both LLVM values.
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
    WORD,
    field,
    high_nibbles,
    joined,
    load,
    load_byte,
    load_bytes,
    load_half,
    looked_up,
    low_nibbles,
    same,
    signed_floats,
    splat,
    store,
    unsigned_floats,
)

EmitBlock = Callable[[Any, Any, Any], None]
"""Of a builder, a block's address, and where its values go."""


def _at(builder: Any, address: Any, offset: int) -> Any:
    return builder.add(address, WORD(offset))


def _put(builder: Any, out: Any, first: int, values: Any) -> None:
    """Stores `values` as those from number `first` of the block on."""
    store(builder, values, _at(builder, out, 4 * first))


def _halves(builder: Any, address: Any) -> Any:
    """The 32 codes of 16 bytes: the low halves, then the high ones."""
    packed = load_bytes(builder, address, 16)
    return joined(builder, low_nibbles(builder, packed), high_nibbles(builder, packed))


def _times(builder: Any, step: Any, values: Any) -> Any:
    return builder.fmul(splat(builder, step, values.type.count), values)


def _from_steps(builder: Any, steps: Sequence[Any], values: Any) -> Any:
    """`values` times `steps`, one step for each 16 of them, two in all."""
    both = joined(builder, *(splat(builder, step, 16) for step in steps))
    return builder.fmul(both, values)


# --- one scale for 32 values ---------------------------------------------------------------------------


def _q4_0(builder: Any, block: Any, out: Any) -> None:
    values = unsigned_floats(builder, _halves(builder, _at(builder, block, 2)))
    _put(builder, out, 0, _times(builder, load_half(builder, block), builder.fsub(values, same(values, 8.0))))


def _q4_1(builder: Any, block: Any, out: Any) -> None:
    _with_low(builder, block, unsigned_floats(builder, _halves(builder, _at(builder, block, 4))), out)


def _with_low(builder: Any, block: Any, values: Any, out: Any) -> None:
    """The scale is the first number of the block, and the second one is what is added."""
    low = splat(builder, load_half(builder, block, 2), 32)
    _put(builder, out, 0, builder.fadd(_times(builder, load_half(builder, block), values), low))


def _five_bits(builder: Any, address: Any) -> Any:
    """32 values of five bits, the highest of which lie in the four bytes at `address`, before the others."""
    wide = ir.VectorType(INT, 32)
    bits = splat(builder, load(builder, address, INT, align=1), 32)
    ones = builder.and_(builder.lshr(bits, ir.Constant(wide, list(range(32)))), ir.Constant(wide, [1] * 32))
    low = builder.zext(_halves(builder, _at(builder, address, 4)), wide)
    return unsigned_floats(builder, builder.or_(low, builder.shl(ones, ir.Constant(wide, [4] * 32))))


def _q5_0(builder: Any, block: Any, out: Any) -> None:
    values = _five_bits(builder, _at(builder, block, 2))
    _put(builder, out, 0, _times(builder, load_half(builder, block), builder.fsub(values, same(values, 16.0))))


def _q5_1(builder: Any, block: Any, out: Any) -> None:
    _with_low(builder, block, _five_bits(builder, _at(builder, block, 4)), out)


def _q8_0(builder: Any, block: Any, out: Any) -> None:
    values = signed_floats(builder, load_bytes(builder, _at(builder, block, 2), 32))
    _put(builder, out, 0, _times(builder, load_half(builder, block), values))


def _iq4_nl(builder: Any, block: Any, out: Any) -> None:
    values = looked_up(builder, _table(IQ4), _halves(builder, _at(builder, block, 2)))
    _put(builder, out, 0, _times(builder, load_half(builder, block), values))


def _mxfp4(builder: Any, block: Any, out: Any) -> None:
    doubled = looked_up(builder, _table(MXFP4), _halves(builder, _at(builder, block, 1)))
    exponent = builder.zext(load_byte(builder, block), INT)
    # 2 to the exponent - 128, the smallest two of which are subnormal.
    normal = builder.shl(builder.sub(exponent, INT(1)), INT(23))
    small = builder.shl(INT(0x00200000), exponent)
    bits = builder.select(builder.icmp_unsigned("<", exponent, INT(2)), small, normal)
    _put(builder, out, 0, _times(builder, builder.bitcast(bits, SINGLE), doubled))


def _table(values: tuple[float, ...]) -> Any:
    return ir.Constant(ir.VectorType(SINGLE, 16), list(values))


# --- 256 values with scales of their own for every 16 or 32 ----------------------------------------------


def _float(builder: Any, value: Any) -> Any:
    """An unsigned byte as a float32."""
    return builder.uitofp(value, SINGLE)


def _q2_k(builder: Any, block: Any, out: Any) -> None:
    step, low = load_half(builder, block, 80), load_half(builder, block, 82)
    for half in range(2):
        packed = load_bytes(builder, _at(builder, block, 16 + 32 * half), 32)
        for shift in range(4):
            place = 8 * half + 2 * shift
            codes = [load_byte(builder, block, place + side) for side in range(2)]
            steps = [builder.fmul(step, _float(builder, builder.and_(code, BYTE(15)))) for code in codes]
            lows = [builder.fmul(low, _float(builder, builder.lshr(code, BYTE(4)))) for code in codes]
            values = unsigned_floats(builder, field(builder, packed, 2 * shift, 3))
            lowest = joined(builder, *(splat(builder, each, 16) for each in lows))
            _put(builder, out, 16 * place, builder.fsub(_from_steps(builder, steps, values), lowest))


def _q3_k(builder: Any, block: Any, out: Any) -> None:
    step, present = load_half(builder, block, 108), load_bytes(builder, block, 32)
    for half in range(2):
        packed = load_bytes(builder, _at(builder, block, 32 + 32 * half), 32)
        for shift in range(4):
            place = 4 * half + shift
            steps = [builder.fmul(step, _q3_scale(builder, block, 2 * place + side)) for side in range(2)]
            absent = builder.xor(field(builder, present, place, 1), same(present, 1))
            codes = builder.sub(field(builder, packed, 2 * shift, 3), builder.shl(absent, same(absent, 2)))
            _put(builder, out, 32 * place, _from_steps(builder, steps, signed_floats(builder, codes)))


def _q3_scale(builder: Any, block: Any, number: int) -> Any:
    low = load_byte(builder, block, 96 + number % 8)
    low = builder.and_(low, BYTE(15)) if number < 8 else builder.lshr(low, BYTE(4))
    high = builder.lshr(load_byte(builder, block, 104 + number % 4), BYTE(2 * (number // 4)))
    code = builder.or_(low, builder.shl(builder.and_(high, BYTE(3)), BYTE(4)))
    return builder.sitofp(builder.sub(code, BYTE(32)), SINGLE)


def _steps_and_lows(builder: Any, block: Any) -> list[tuple[Any, Any]]:
    """The scale, and what is subtracted, of each 32 values of Q4_K and Q5_K."""
    step, low = load_half(builder, block, 0), load_half(builder, block, 2)
    packed = [load_byte(builder, block, 4 + at) for at in range(12)]

    def six(four: Any, two: Any) -> Any:
        """Six bits: the lower four of `four`, and the upper two of `two`."""
        return builder.or_(four, builder.shl(builder.lshr(two, BYTE(6)), BYTE(4)))

    found = []
    for at in range(8):
        if at < 4:
            scale, minimum = (builder.and_(packed[at + by], BYTE(63)) for by in (0, 4))
        else:
            scale = six(builder.and_(packed[at + 4], BYTE(15)), packed[at - 4])
            minimum = six(builder.lshr(packed[at + 4], BYTE(4)), packed[at])
        found.append((builder.fmul(step, _float(builder, scale)), builder.fmul(low, _float(builder, minimum))))
    return found


def _q4_k(builder: Any, block: Any, out: Any) -> None:
    scales = _steps_and_lows(builder, block)
    for pair in range(4):
        packed = load_bytes(builder, _at(builder, block, 16 + 32 * pair), 32)
        for side, codes in enumerate((low_nibbles(builder, packed), high_nibbles(builder, packed))):
            _put_affine(builder, out, 2 * pair + side, scales, codes)


def _q5_k(builder: Any, block: Any, out: Any) -> None:
    scales, high = _steps_and_lows(builder, block), load_bytes(builder, _at(builder, block, 16), 32)
    for pair in range(4):
        packed = load_bytes(builder, _at(builder, block, 48 + 32 * pair), 32)
        for side, codes in enumerate((low_nibbles(builder, packed), high_nibbles(builder, packed))):
            number = 2 * pair + side
            bit = field(builder, high, number, 1)
            _put_affine(builder, out, number, scales, builder.or_(codes, builder.shl(bit, same(bit, 4))))


def _put_affine(builder: Any, out: Any, number: int, scales: list[tuple[Any, Any]], codes: Any) -> None:
    step, low = scales[number]
    values = _times(builder, step, unsigned_floats(builder, codes))
    _put(builder, out, 32 * number, builder.fsub(values, splat(builder, low, 32)))


def _q6_k(builder: Any, block: Any, out: Any) -> None:
    step = load_half(builder, block, 208)
    for half in range(2):
        low = [load_bytes(builder, _at(builder, block, 64 * half + 32 * side), 32) for side in range(2)]
        high = load_bytes(builder, _at(builder, block, 128 + 32 * half), 32)
        for part in range(4):
            four = low_nibbles(builder, low[part]) if part < 2 else high_nibbles(builder, low[part - 2])
            two = field(builder, high, 2 * part, 3)
            codes = builder.sub(builder.or_(four, builder.shl(two, same(two, 4))), same(four, 32))
            number = 4 * half + part
            scales = [load_byte(builder, block, 192 + 2 * number + side) for side in range(2)]
            steps = [builder.fmul(step, builder.sitofp(scale, SINGLE)) for scale in scales]
            _put(builder, out, 32 * number, _from_steps(builder, steps, signed_floats(builder, codes)))


def _iq4_xs(builder: Any, block: Any, out: Any) -> None:
    step, table = load_half(builder, block), _table(IQ4)
    high = builder.zext(load(builder, _at(builder, block, 2), ir.IntType(16), align=1), INT)
    for number in range(8):
        low = builder.zext(load_byte(builder, block, 4 + number // 2), INT)
        low = builder.and_(builder.lshr(low, INT(4 * (number % 2))), INT(15))
        two = builder.and_(builder.lshr(high, INT(2 * number)), INT(3))
        scale = builder.sub(builder.or_(low, builder.shl(two, INT(4))), INT(32))
        own = builder.fmul(step, builder.sitofp(scale, SINGLE))
        codes = _halves(builder, _at(builder, block, 8 + 16 * number))
        _put(builder, out, 32 * number, _times(builder, own, looked_up(builder, table, codes)))


EMITTED: dict[str, EmitBlock] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0, "Q2_K": _q2_k, "Q3_K": _q3_k,
    "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k, "IQ4_NL": _iq4_nl, "IQ4_XS": _iq4_xs, "MXFP4": _mxfp4,
}  # fmt: skip
"""The function of each packed type that there is code for. The types of large tables (IQ2, IQ3) have none."""
