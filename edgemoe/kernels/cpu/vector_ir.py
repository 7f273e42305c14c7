"""Small pieces of LLVM vector code that kernels are made of. Addresses and counts are 64-bit words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from edgemoe.kernels.cpu.cpu_features import has, is_x86

WORD = ir.IntType(64)
INT = ir.IntType(32)
BYTE = ir.IntType(8)
SINGLE = ir.FloatType()
HALF = ir.HalfType()


@contextmanager
def counting(builder: Any, first: Any, stop: Any, step: int) -> Iterator[Any]:
    """A loop from `first` to `stop`; the block gets the number."""
    with cgutils.for_range_slice(builder, first, stop, WORD(step), intp=WORD) as (number, _):
        yield number


def load(builder: Any, address: Any, kind: Any, align: int = 2) -> Any:
    """The value of type `kind` at `address`."""
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=align)


def load_bytes(builder: Any, address: Any, count: int) -> Any:
    """The vector of `count` bytes at `address`."""
    return load(builder, address, ir.VectorType(BYTE, count), align=1)


def load_byte(builder: Any, address: Any, at: int = 0) -> Any:
    """The byte `at` bytes after `address`."""
    return load(builder, builder.add(address, WORD(at)), BYTE, align=1)


def load_half(builder: Any, address: Any, at: int = 0) -> Any:
    """The fp16 `at` bytes after `address`, as a float32."""
    return builder.fpext(load(builder, builder.add(address, WORD(at)), HALF, align=1), SINGLE)


def store(builder: Any, values: Any, address: Any) -> None:
    """Stores `values` at `address`."""
    builder.store(values, builder.inttoptr(address, values.type.as_pointer()), align=4)


def lanes(vector: Any) -> int:
    """The number of values in `vector`."""
    return int(vector.type.count)


def splat(builder: Any, value: Any, count: int) -> Any:
    """A vector of `count` times `value`."""
    kind = ir.VectorType(value.type, count)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, INT(0))
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), _mask([0] * count))


def same(vector: Any, value: float) -> Any:
    """A constant of the type of `vector`, with `value` everywhere."""
    return ir.Constant(vector.type, [value] * lanes(vector))


def joined(builder: Any, first: Any, second: Any) -> Any:
    """The values of two vectors of one length, one after the other."""
    return builder.shuffle_vector(first, second, _mask(range(2 * lanes(first))))


def interleaved(builder: Any, first: Any, second: Any) -> Any:
    """The values of two vectors of one length, in turn."""
    count = lanes(first)
    return builder.shuffle_vector(first, second, _mask(at for pair in range(count) for at in (pair, pair + count)))


def part(builder: Any, vector: Any, first: int, count: int) -> Any:
    """`count` values of `vector` from number `first` on."""
    return builder.shuffle_vector(vector, vector, _mask(range(first, first + count)))


def low_nibbles(builder: Any, packed: Any) -> Any:
    """The lower four bits of each byte."""
    return builder.and_(packed, same(packed, 15))


def high_nibbles(builder: Any, packed: Any) -> Any:
    """The higher four bits of each byte."""
    return builder.lshr(packed, same(packed, 4))


def field(builder: Any, packed: Any, shift: int, mask: int) -> Any:
    """The bits of each value from bit `shift` on that `mask` has."""
    moved = builder.lshr(packed, same(packed, shift)) if shift else packed
    return builder.and_(moved, same(packed, mask))


def unsigned_floats(builder: Any, values: Any) -> Any:
    """Unsigned integers as float32."""
    return builder.uitofp(values, ir.VectorType(SINGLE, lanes(values)))


def signed_floats(builder: Any, values: Any) -> Any:
    """Signed integers as float32."""
    return builder.sitofp(values, ir.VectorType(SINGLE, lanes(values)))


def looked_up(builder: Any, table: Any, codes: Any) -> Any:
    """The values of `table`, a vector of 16 float32, that the bytes `codes`, each below 16, name."""
    count = lanes(codes)
    places = builder.zext(codes, ir.VectorType(INT, count))
    width, look = _lookup(builder, table)
    found = [look(part(builder, places, first, width)) for first in range(0, count, width)]
    while len(found) > 1:
        found = [joined(builder, found[at], found[at + 1]) for at in range(0, len(found), 2)]
    return found[0]


def _lookup(builder: Any, table: Any) -> tuple[int, Any]:
    """How many codes are looked up at a time, and the function for them."""
    if has("avx512f"):
        wide = ir.VectorType(SINGLE, 16)
        kind = ir.FunctionType(wide, [wide, ir.VectorType(INT, 16)])
        permute = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.permvar.sf.512")
        return 16, lambda places: builder.call(permute, [table, places])
    if is_x86() and has("avx2"):
        wide = ir.VectorType(SINGLE, 8)
        kind = ir.FunctionType(wide, [wide, ir.VectorType(INT, 8)])
        permute = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx2.permps")
        halves = part(builder, table, 0, 8), part(builder, table, 8, 8)

        def look(places: Any) -> Any:
            low, high = (builder.call(permute, [half, places]) for half in halves)
            return builder.select(builder.icmp_unsigned(">=", places, same(places, 8)), high, low)

        return 8, look

    def one_by_one(places: Any) -> Any:
        found = ir.Constant(ir.VectorType(SINGLE, 8), ir.Undefined)
        for at in range(8):
            value = builder.extract_element(table, builder.extract_element(places, INT(at)))
            found = builder.insert_element(found, value, INT(at))
        return found

    return 8, one_by_one


def rounded_to_bf16(builder: Any, values: Any) -> Any:
    """Finite float32 `values`, rounded to the nearest bf16, ties to even, as float32."""
    bits = builder.bitcast(values, ir.VectorType(INT, lanes(values)))
    odd = builder.and_(builder.lshr(bits, same(bits, 16)), same(bits, 1))
    raised = builder.add(builder.add(bits, same(bits, 0x7FFF)), odd)
    return builder.bitcast(builder.and_(raised, same(bits, 0xFFFF0000)), values.type)


def rounded_to_fp16(builder: Any, values: Any) -> Any:
    """Float32 `values`, rounded to fp16, as float32."""
    return builder.fpext(builder.fptrunc(values, ir.VectorType(HALF, lanes(values))), values.type)


def _mask(places: Any) -> Any:
    found = list(places)
    return ir.Constant(ir.VectorType(INT, len(found)), found)
