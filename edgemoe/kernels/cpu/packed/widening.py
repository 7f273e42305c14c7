"""How compiled code reads packed weights: a few columns of a row at a time, as float32, as the formats' `rows` do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from llvmlite import ir

from edgemoe.formats.codes import E2M1
from edgemoe.formats.gguf_format import BLOCKS
from edgemoe.kernels.cpu.dot_block import Widened
from edgemoe.kernels.cpu.packed.widen_gguf import EMITTED, Put
from edgemoe.kernels.cpu.vector_ir import (
    HALF,
    INT,
    SINGLE,
    WORD,
    load,
    load_byte,
    load_bytes,
    load_half,
    looked_up,
    nibbles,
    of_codes,
    offset,
    rounded_to_bf16,
    rounded_to_fp16,
    same,
    signed_floats,
    splat,
)

LOW_FIRST = range(0, 32, 4)
HIGH_FIRST = (4, 0, 12, 8, 20, 16, 28, 24)
"""Where the eight codes of four bytes begin: the lower one of each byte first, or the higher one."""


class Widening(Protocol):
    """The reading of one format."""

    values: int
    """Columns that are read at a time; a row is a multiple of them."""
    parts: int
    """The number of parts that a matrix has in a record."""
    block: tuple[int, int]
    """Values of the first part that lie together, and their bytes."""

    def emit(self, builder: Any, parts: Sequence[Any], columns: Any, row: Any, column: Any, put: Put) -> None:
        """Puts `values` float32 of `row` from `column` on, in their order.

        The others are LLVM values: the addresses of the matrix's parts in a record, in the format's order, and words.
        """


class Gguf:
    """Blocks of one of GGUF's types."""

    parts = 1

    def __init__(self, kind: str) -> None:
        self.block = self.values, self._nbytes = BLOCKS[kind]
        self._emit = EMITTED[kind]

    def emit(self, builder: Any, parts: Sequence[Any], columns: Any, row: Any, column: Any, put: Put) -> None:
        """See `Widening`."""
        number = _over(builder, _place(builder, columns, row, column), self.values)
        self._emit(builder, builder.add(parts[0], builder.mul(number, WORD(self._nbytes))), put)


class Floats:
    """Floats of 16 or 32 bits."""

    values, parts = 32, 1

    def __init__(self, kind: str) -> None:
        """`kind` is `bf16`, `f16` or `f32`."""
        self._dot = Widened(kind)
        self._nbytes = self._dot.weight_nbytes
        self.block = 1, self._nbytes

    def emit(self, builder: Any, parts: Sequence[Any], columns: Any, row: Any, column: Any, put: Put) -> None:
        """See `Widening`."""
        place = builder.mul(_place(builder, columns, row, column), WORD(self._nbytes))
        address = builder.add(parts[0], place)
        for at in range(0, self.values, self._dot.values):
            put(at, self._dot.weights(builder, offset(builder, address, at * self._nbytes)))


class FourBits:
    """bitsandbytes' nf4 and fp4 in blocks of 64 values, none of which crosses the end of a row."""

    values, parts, block = 64, 3, (2, 1)

    def emit(self, builder: Any, parts: Sequence[Any], columns: Any, row: Any, column: Any, put: Put) -> None:
        """See `Widening`."""
        codes, maxima, table = parts
        place = _place(builder, columns, row, column)
        largest = splat(builder, _single(builder, maxima, _over(builder, place, 64)), 16)
        own = builder.fmul(load(builder, table, largest.type, align=4), largest)
        address = builder.add(codes, _over(builder, place, 2))
        for first in range(0, 64, 16):
            put(first, looked_up(builder, own, nibbles(builder, offset(builder, address, first // 2), HIGH_FIRST)))


class RowsOfInt8:
    """bitsandbytes' int8: a byte a value, and a maximum a row."""

    values, parts, block = 32, 2, (1, 1)

    def emit(self, builder: Any, parts: Sequence[Any], columns: Any, row: Any, column: Any, put: Put) -> None:
        """See `Widening`."""
        codes, maxima = parts
        values = signed_floats(
            builder, load_bytes(builder, builder.add(codes, _place(builder, columns, row, column)), 32)
        )
        scaled = builder.fmul(values, splat(builder, _single(builder, maxima, row), 32))
        put(0, builder.fmul(scaled, same(scaled, 7.874015718698502e-3)))


class GroupsOfInt4:
    """compressed-tensors' int4 without zero points: groups of a multiple of 32 columns, or of whole rows."""

    values, parts, block = 32, 2, (2, 1)

    def __init__(self, group: int, scale: str) -> None:
        """`group` is 0 for whole rows; `scale` is the dtype of the scales, `bf16`, `f16` or `f32`."""
        self._group = group
        self._scale = scale

    def emit(self, builder: Any, parts: Sequence[Any], columns: Any, row: Any, column: Any, put: Put) -> None:
        """See `Widening`."""
        words, scales = parts
        place = _place(builder, columns, row, column)
        number = _over(builder, place, self._group) if self._group else row
        scale = splat(builder, _scalar(builder, scales, number, self._scale), 16)

        def make(codes: Any) -> Any:
            product = builder.fmul(builder.fsub(codes, same(codes, 8.0)), scale)
            if self._scale == "bf16":
                return rounded_to_bf16(builder, product)
            return rounded_to_fp16(builder, product) if self._scale == "f16" else product

        address = builder.add(words, _over(builder, place, 2))
        codes = [nibbles(builder, offset(builder, address, at), LOW_FIRST) for at in (0, 8)]
        for number, values in enumerate(of_codes(builder, make, codes, costly=self._scale != "f32")):
            put(16 * number, values)


class Mxfp4:
    """gpt-oss' MXFP4: 32 values and an exponent."""

    values, parts, block = 32, 2, (2, 1)

    def emit(self, builder: Any, parts: Sequence[Any], columns: Any, row: Any, column: Any, put: Put) -> None:
        """See `Widening`."""
        place = _place(builder, columns, row, column)
        byte = load_byte(builder, builder.add(parts[1], _over(builder, place, 32)))
        exponent = builder.zext(byte, INT)
        # 2 to the exponent - 127, the smallest of which is subnormal.
        zero = builder.icmp_unsigned("==", exponent, INT(0))
        bits = builder.select(zero, INT(0x00400000), builder.shl(exponent, INT(23)))
        table = _scaled_e2m1(builder, builder.bitcast(bits, SINGLE))
        address = builder.add(parts[0], _over(builder, place, 2))
        for at in (0, 8):
            put(2 * at, looked_up(builder, table, nibbles(builder, offset(builder, address, at), LOW_FIRST)))


class Nvfp4:
    """NVFP4: 16 values and an 8-bit float, with a factor for the matrix."""

    values, parts, block = 16, 3, (2, 1)

    def __init__(self, *, divides: bool) -> None:
        """`divides`: whether the scales are divided by the factor."""
        self._divides = divides

    def emit(self, builder: Any, parts: Sequence[Any], columns: Any, row: Any, column: Any, put: Put) -> None:
        """See `Widening`."""
        codes, scales, factor = parts
        place = _place(builder, columns, row, column)
        byte = load_bytes(builder, builder.add(scales, _over(builder, place, 16)), 1)
        scale = builder.extract_element(_e4m3(builder, byte), INT(0))
        all_of_it = load(builder, factor, SINGLE, align=4)
        scale = builder.fdiv(scale, all_of_it) if self._divides else builder.fmul(scale, all_of_it)
        found = nibbles(builder, builder.add(codes, _over(builder, place, 2)), LOW_FIRST)
        put(0, looked_up(builder, _scaled_e2m1(builder, scale), found))


class Fp8:
    """8-bit floats (e4m3) with a scale for each block of rows x columns; 0 stands for all of them."""

    values, parts, block = 32, 2, (1, 1)

    def __init__(self, block: tuple[int, int], scale: str) -> None:
        """The blocks are a multiple of 32 columns wide. `scale` is `f32` or `bf16`."""
        self._height, self._width = block
        self._scale = scale

    def emit(self, builder: Any, parts: Sequence[Any], columns: Any, row: Any, column: Any, put: Put) -> None:
        """See `Widening`."""
        place = builder.add(parts[0], _place(builder, columns, row, column))
        values = _e4m3(builder, load_bytes(builder, place, 32))
        band = _over(builder, row, self._height) if self._height else WORD(0)
        at = band
        if self._width:
            wide = _over(builder, builder.add(columns, WORD(self._width - 1)), self._width)
            at = builder.add(builder.mul(band, wide), _over(builder, column, self._width))
        scale = _scalar(builder, parts[1], at, self._scale)
        put(0, builder.fmul(values, splat(builder, scale, 32)))


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
        return load_half(builder, place)
    bits = builder.zext(load(builder, place, ir.IntType(16)), INT)
    return builder.bitcast(builder.shl(bits, INT(16)), SINGLE)


def _scaled_e2m1(builder: Any, scale: Any) -> Any:
    """The values of the codes of E2M1, times `scale`."""
    return builder.fmul(ir.Constant(ir.VectorType(SINGLE, 16), list(E2M1)), splat(builder, scale, 16))


def _e4m3(builder: Any, values: Any) -> Any:
    """8-bit floats of four bits of exponent, which have no infinities, as float32."""
    count = values.type.count
    # Sign, exponent and mantissa at their places in an fp16, whose exponent has a bias of 15 where this one has 7.
    # Subnormal values are converted as fast as others, which is not so for the products of float32.
    wide = builder.sext(values, ir.VectorType(ir.IntType(16), count))
    bits = builder.and_(builder.shl(wide, same(wide, 7)), same(wide, 0xBF80))
    small = builder.fpext(builder.bitcast(bits, ir.VectorType(HALF, count)), ir.VectorType(SINGLE, count))
    magnitude = builder.and_(values, same(values, 127))
    none = builder.icmp_unsigned("==", magnitude, same(values, 127))
    return builder.select(none, same(small, float("nan")), builder.fmul(small, same(small, 256.0)))
