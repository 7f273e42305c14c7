"""How compiled code reads packed weights: a few columns of a row at a time, as float32, as the formats' `rows` do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from llvmlite import ir

from edgemoe.formats.codes import E2M1
from edgemoe.formats.gguf_format import BLOCKS
from edgemoe.kernels.cpu.vector_ir import (
    BYTE,
    INT,
    SINGLE,
    WORD,
    high_nibbles,
    interleaved,
    load,
    load_byte,
    load_bytes,
    looked_up,
    low_nibbles,
    rounded_to_bf16,
    rounded_to_fp16,
    same,
    signed_floats,
    splat,
    store,
    unsigned_floats,
)
from edgemoe.kernels.cpu.widen_gguf import EMITTED


class Widening(Protocol):
    """The reading of one format."""

    values: int
    """Columns that are read at a time; a row is a multiple of them."""
    parts: int
    """The number of parts that a matrix has in a record."""

    def emit(self, builder: Any, parts: Sequence[Any], columns: Any, row: Any, column: Any, out: Any) -> None:
        """Stores `values` float32 of `row` from `column` on at `out`.

        All are LLVM values: the addresses of the matrix's parts in a record, in the order of the format's, and words.
        """


class Gguf:
    """Blocks of one of GGUF's types."""

    parts = 1

    def __init__(self, kind: str) -> None:
        self.values, self._nbytes = BLOCKS[kind]
        self._emit = EMITTED[kind]

    def emit(self, builder: Any, parts: Sequence[Any], columns: Any, row: Any, column: Any, out: Any) -> None:
        """See `Widening`."""
        number = _over(builder, _place(builder, columns, row, column), self.values)
        self._emit(builder, builder.add(parts[0], builder.mul(number, WORD(self._nbytes))), out)


class FourBits:
    """bitsandbytes' nf4 and fp4 in blocks of 64 values, none of which crosses the end of a row."""

    values, parts = 64, 3

    def emit(self, builder: Any, parts: Sequence[Any], columns: Any, row: Any, column: Any, out: Any) -> None:
        """See `Widening`."""
        codes, maxima, table = parts
        place = _place(builder, columns, row, column)
        packed = load_bytes(builder, builder.add(codes, _over(builder, place, 2)), 32)
        pairs = interleaved(builder, high_nibbles(builder, packed), low_nibbles(builder, packed))
        values = looked_up(builder, load(builder, table, ir.VectorType(SINGLE, 16), align=4), pairs)
        largest = _single(builder, maxima, _over(builder, place, 64))
        store(builder, builder.fmul(values, splat(builder, largest, 64)), out)


class RowsOfInt8:
    """bitsandbytes' int8: a byte a value, and a maximum a row."""

    values, parts = 32, 2

    def emit(self, builder: Any, parts: Sequence[Any], columns: Any, row: Any, column: Any, out: Any) -> None:
        """See `Widening`."""
        codes, maxima = parts
        values = signed_floats(
            builder, load_bytes(builder, builder.add(codes, _place(builder, columns, row, column)), 32)
        )
        scaled = builder.fmul(values, splat(builder, _single(builder, maxima, row), 32))
        store(builder, builder.fmul(scaled, same(scaled, 7.874015718698502e-3)), out)


class GroupsOfInt4:
    """compressed-tensors' int4 without zero points: groups of a multiple of 32 columns, or of whole rows."""

    values, parts = 32, 2

    def __init__(self, group: int, scale: str) -> None:
        """`group` is 0 for whole rows; `scale` is the dtype of the scales, `bf16`, `f16` or `f32`."""
        self._group = group
        self._scale = scale

    def emit(self, builder: Any, parts: Sequence[Any], columns: Any, row: Any, column: Any, out: Any) -> None:
        """See `Widening`."""
        words, scales = parts
        place = _place(builder, columns, row, column)
        packed = load_bytes(builder, builder.add(words, _over(builder, place, 2)), 16)
        codes = interleaved(builder, low_nibbles(builder, packed), high_nibbles(builder, packed))
        values = builder.fsub(unsigned_floats(builder, codes), ir.Constant(ir.VectorType(SINGLE, 32), [8.0] * 32))
        scale = _scalar(builder, scales, _over(builder, place, self._group) if self._group else row, self._scale)
        product = builder.fmul(values, splat(builder, scale, 32))
        if self._scale == "bf16":
            product = rounded_to_bf16(builder, product)
        elif self._scale == "f16":
            product = rounded_to_fp16(builder, product)
        store(builder, product, out)


class Mxfp4:
    """gpt-oss' MXFP4: 32 values and an exponent."""

    values, parts = 32, 2

    def emit(self, builder: Any, parts: Sequence[Any], columns: Any, row: Any, column: Any, out: Any) -> None:
        """See `Widening`."""
        place = _place(builder, columns, row, column)
        values = _four_bit_floats(builder, builder.add(parts[0], _over(builder, place, 2)), 16)
        byte = load_byte(builder, builder.add(parts[1], _over(builder, place, 32)))
        exponent = builder.zext(byte, INT)
        # 2 to the exponent - 127, the smallest of which is subnormal.
        zero = builder.icmp_unsigned("==", exponent, INT(0))
        bits = builder.select(zero, INT(0x00400000), builder.shl(exponent, INT(23)))
        store(builder, builder.fmul(values, splat(builder, builder.bitcast(bits, SINGLE), 32)), out)


class Nvfp4:
    """NVFP4: 16 values and an 8-bit float, with a factor for the matrix."""

    values, parts = 16, 3

    def __init__(self, *, divides: bool) -> None:
        """`divides`: whether the scales are divided by the factor."""
        self._divides = divides

    def emit(self, builder: Any, parts: Sequence[Any], columns: Any, row: Any, column: Any, out: Any) -> None:
        """See `Widening`."""
        codes, scales, factor = parts
        place = _place(builder, columns, row, column)
        values = _four_bit_floats(builder, builder.add(codes, _over(builder, place, 2)), 8)
        byte = load_bytes(builder, builder.add(scales, _over(builder, place, 16)), 1)
        scale = builder.extract_element(_e4m3(builder, byte), INT(0))
        all_of_it = load(builder, factor, SINGLE, align=4)
        scale = builder.fdiv(scale, all_of_it) if self._divides else builder.fmul(scale, all_of_it)
        store(builder, builder.fmul(values, splat(builder, scale, 16)), out)


class Fp8:
    """8-bit floats (e4m3) with a scale for each block of rows x columns; 0 stands for all of them."""

    values, parts = 32, 2

    def __init__(self, block: tuple[int, int], scale: str) -> None:
        """The blocks are a multiple of 32 columns wide. `scale` is `f32` or `bf16`."""
        self._height, self._width = block
        self._scale = scale

    def emit(self, builder: Any, parts: Sequence[Any], columns: Any, row: Any, column: Any, out: Any) -> None:
        """See `Widening`."""
        place = builder.add(parts[0], _place(builder, columns, row, column))
        values = _e4m3(builder, load_bytes(builder, place, 32))
        band = _over(builder, row, self._height) if self._height else WORD(0)
        at = band
        if self._width:
            wide = _over(builder, builder.add(columns, WORD(self._width - 1)), self._width)
            at = builder.add(builder.mul(band, wide), _over(builder, column, self._width))
        scale = _scalar(builder, parts[1], at, self._scale)
        store(builder, builder.fmul(values, splat(builder, scale, 32)), out)


def _place(builder: Any, columns: Any, row: Any, column: Any) -> Any:
    """The number of a value in the matrix."""
    return builder.add(builder.mul(row, columns), column)


def _over(builder: Any, value: Any, by: int) -> Any:
    return builder.udiv(value, WORD(by))


def _single(builder: Any, address: Any, number: Any) -> Any:
    return _scalar(builder, address, number, "f32")


def _scalar(builder: Any, address: Any, number: Any, kind: str) -> Any:
    """The float number `number` at `address`, as a float32."""
    if kind == "f32":
        return load(builder, builder.add(address, builder.mul(number, WORD(4))), SINGLE, align=4)
    place = builder.add(address, builder.mul(number, WORD(2)))
    if kind == "f16":
        return builder.fpext(load(builder, place, ir.HalfType()), SINGLE)
    bits = builder.zext(load(builder, place, ir.IntType(16)), INT)
    return builder.bitcast(builder.shl(bits, INT(16)), SINGLE)


def _four_bit_floats(builder: Any, address: Any, nbytes: int) -> Any:
    """The values of the codes of `nbytes` bytes, the lower one of each first."""
    packed = load_bytes(builder, address, nbytes)
    codes = interleaved(builder, low_nibbles(builder, packed), high_nibbles(builder, packed))
    return looked_up(builder, ir.Constant(ir.VectorType(SINGLE, 16), list(E2M1)), codes)


def _e4m3(builder: Any, values: Any) -> Any:
    """8-bit floats of four bits of exponent, which have no infinities, as float32."""
    count = values.type.count
    wide = ir.VectorType(INT, count)
    bits = builder.zext(builder.and_(values, ir.Constant(values.type, [127] * count)), wide)
    # The exponent's bias is 7, and float32's 127: subnormal values come out right as well.
    small = builder.bitcast(builder.shl(bits, same(bits, 20)), ir.VectorType(SINGLE, count))
    large = builder.fmul(small, same(small, 2.0**120))
    none = builder.icmp_unsigned("==", bits, same(bits, 127))
    signs = builder.zext(builder.and_(values, ir.Constant(values.type, [BYTE(128).constant] * count)), wide)
    magnitude = builder.bitcast(builder.select(none, same(bits, 0x7FC00000), builder.bitcast(large, wide)), wide)
    return builder.bitcast(builder.or_(magnitude, builder.shl(signs, same(signs, 24))), large.type)
