"""Small pieces of LLVM vector code that kernels are made of. Addresses and counts are 64-bit words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

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


def in_portions(builder: Any, first: Any, stop: Any, most: int, run: Callable[[Any, int], None]) -> None:
    """`run(number, count)` for portions of `most` numbers from `first` to `stop`, then for those that are left."""
    whole = builder.sub(stop, builder.srem(builder.sub(stop, first), WORD(most)))
    with counting(builder, first, whole, most) as number:
        run(number, most)
    for count in range(1, most):
        with builder.if_then(builder.icmp_signed("==", builder.sub(stop, whole), WORD(count))):
            run(whole, count)


def row_blocks(builder: Any, first: Any, stop: Any, most: int) -> Iterator[tuple[Any, int]]:
    """Loops over blocks of `most` rows from `first` to `stop`, then over the rows that are left.

    Gives the first row of a block, and how many there are; what the caller then emits is the loop's body.
    """
    whole = builder.sub(stop, builder.srem(builder.sub(stop, first), WORD(most)))
    left = [(whole, stop, 1)] if most > 1 else []
    for begin, end, count in [(first, whole, most), *left]:
        with counting(builder, begin, end, count) as row:
            yield row, count


def native_loop(emit: Callable[[Any, Any, Any, Any, Any], None]) -> Callable[..., None]:
    """A numba intrinsic of four words: the address of a job, that of memory to work in, the first row and the end.

    `emit` writes its code, of a builder and these.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit(builder, *arguments)
        return context.get_dummy_value()

    @intrinsic
    def loop(typing_context: Any, job: Any, scratch: Any, first: Any, last: Any) -> Any:
        return types.void(job, scratch, first, last), generate

    return loop


def pointer_to(kind: Any) -> Callable[[int], Any]:
    """A numba intrinsic: an address as a pointer to numba's type `kind`, for `numba.carray`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    def pointer(typing_context: Any, address: Any) -> Any:
        return types.CPointer(kind)(address), generate

    made: Callable[[int], Any] = intrinsic(pointer)  # type: ignore[assignment]
    return made


def load_words(builder: Any, address: Any, count: int) -> list[Any]:
    """The `count` words from `address` on."""
    return [load(builder, offset(builder, address, 8 * at), WORD, align=8) for at in range(count)]


def load(builder: Any, address: Any, kind: Any, align: int = 2) -> Any:
    """The value of type `kind` at `address`."""
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=align)


def pause(builder: Any) -> None:
    """Tells the CPU of a loop that waits."""
    name, arguments = ("llvm.x86.sse2.pause", []) if is_x86() else ("llvm.aarch64.hint", [INT(1)])
    kind = ir.FunctionType(ir.VoidType(), [INT] * len(arguments))
    builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def prefetch(builder: Any, address: Any) -> None:
    """Asks for the cache line at `address`, which may be no valid one."""
    pointer = builder.inttoptr(address, BYTE.as_pointer())
    kind = ir.FunctionType(ir.VoidType(), [pointer.type, INT, INT, INT])
    hint = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    # To read, to be kept in every cache but the first, where the inputs of a few tokens need the room, and data.
    builder.call(hint, [pointer, INT(0), INT(2), INT(1)])


def offset(builder: Any, address: Any, nbytes: int) -> Any:
    """`address`, moved by `nbytes`."""
    return builder.add(address, WORD(nbytes))


def load_bytes(builder: Any, address: Any, count: int) -> Any:
    """The vector of `count` bytes at `address`."""
    return load(builder, address, ir.VectorType(BYTE, count), align=1)


def load_byte(builder: Any, address: Any) -> Any:
    """The byte at `address`."""
    return load(builder, address, BYTE, align=1)


def load_half(builder: Any, address: Any) -> Any:
    """The fp16 at `address`, as a float32."""
    return builder.fpext(load(builder, address, HALF, align=1), SINGLE)


def load_halves(builder: Any, address: Any) -> Any:
    """The two fp16 of the four bytes at `address`, as float32, and two values of 0.

    Where only one of them is a number, this is still faster than `load_half`, which LLVM loads into a part of any
    register: also of one that holds a sum, for which it then has to wait.
    """
    zeros = ir.Constant(ir.VectorType(INT, 4), [0] * 4)
    words = builder.insert_element(zeros, load(builder, address, INT, align=1), INT(0))
    halves = part(builder, builder.bitcast(words, ir.VectorType(HALF, 8)), 0, 4)
    return builder.fpext(halves, ir.VectorType(SINGLE, 4))


def store(builder: Any, values: Any, address: Any, align: int = 4) -> None:
    """Stores `values` at `address`."""
    builder.store(values, builder.inttoptr(address, values.type.as_pointer()), align=align)


def lanes(vector: Any) -> int:
    """The number of values in `vector`."""
    return int(vector.type.count)


def splat(builder: Any, value: Any, count: int) -> Any:
    """A vector of `count` times `value`."""
    kind = ir.VectorType(value.type, count)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, INT(0))
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), _mask([0] * count))


def spread(builder: Any, vector: Any, places: Sequence[int], each: int) -> Any:
    """The values of `vector` at `places`, each of them `each` times."""
    return builder.shuffle_vector(vector, vector, _mask(place for place in places for _ in range(each)))


def same(vector: Any, value: float) -> Any:
    """A constant of the type of `vector`, with `value` everywhere."""
    return ir.Constant(vector.type, [value] * lanes(vector))


def joined(builder: Any, first: Any, second: Any) -> Any:
    """The values of two vectors of one length, one after the other."""
    return builder.shuffle_vector(first, second, _mask(range(2 * lanes(first))))


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


def nibbles(builder: Any, address: Any, shifts: Sequence[int]) -> Any:
    """The 16 codes of four bits in the 8 bytes at `address`, each as the lowest bits of an INT: others may follow.

    `shifts` are where the eight codes of four bytes, a little-endian word, begin.
    """
    words = load(builder, address, ir.VectorType(INT, 2), align=1)
    spread = builder.shuffle_vector(words, words, _mask([0] * 8 + [1] * 8))
    return builder.lshr(spread, ir.Constant(spread.type, list(shifts) * 2))


def split_nibbles(builder: Any, address: Any) -> tuple[Any, Any]:
    """The lower and the higher codes of the 16 bytes at `address`, as `nibbles` has them."""
    words = builder.zext(load_bytes(builder, address, 16), ir.VectorType(INT, 16))
    return words, builder.lshr(words, same(words, 4))


def looked_up(builder: Any, table: Any, codes: Any) -> Any:
    """The values of `table`, 16 float32, that the lowest four bits of the 16 INT `codes` name."""
    if has("avx512f"):
        return _permuted(builder, "llvm.x86.avx512.permvar.sf.512", table, codes)
    if is_x86() and has("avx2"):
        halves = [_looked_up_by_eights(builder, table, part(builder, codes, first, 8)) for first in (0, 8)]
        return joined(builder, *halves)
    places = builder.and_(codes, same(codes, 15))
    found = ir.Constant(ir.VectorType(SINGLE, 16), ir.Undefined)
    for at in range(16):
        value = builder.extract_element(table, builder.extract_element(places, INT(at)))
        found = builder.insert_element(found, value, INT(at))
    return found


def looks_up_at_once() -> bool:
    """Whether one instruction looks up 16 values."""
    return has("avx512f")


def _looked_up_by_eights(builder: Any, table: Any, codes: Any) -> Any:
    """Eight values: the instruction takes tables of eight, and the lowest three bits."""
    low, high = (_permuted(builder, "llvm.x86.avx2.permps", part(builder, table, first, 8), codes) for first in (0, 8))
    # The fourth bit becomes the sign, which is what the instruction that selects looks at.
    signs = builder.shl(codes, same(codes, 28))
    return builder.select(builder.icmp_signed("<", signs, same(signs, 0)), high, low)


def _permuted(builder: Any, name: str, table: Any, places: Any) -> Any:
    kind = ir.FunctionType(table.type, [table.type, places.type])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [table, places])


def of_codes(builder: Any, make: Callable[[Any], Any], codes: Sequence[Any], *, costly: bool = False) -> list[Any]:
    """`make` of each of the `codes`, vectors as `nibbles` has them, which it gets as float32.

    It is computed once for all 16 codes, and looked up, where that is faster: always, where it is `costly`.
    """
    if costly or looks_up_at_once():
        table = make(ir.Constant(ir.VectorType(SINGLE, 16), [float(code) for code in range(16)]))
        return [looked_up(builder, table, each) for each in codes]
    return [make(unsigned_floats(builder, builder.and_(each, same(each, 15)))) for each in codes]


def multiply_add(builder: Any, first: Any, second: Any, third: Any) -> Any:
    """first * second + third of float32 vectors, rounded once where the CPU can."""
    if is_x86() and not has("fma"):
        return builder.fadd(builder.fmul(first, second), third)
    kind = ir.FunctionType(first.type, [first.type] * 3)
    fma = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{lanes(first)}f32")
    return builder.call(fma, [first, second, third])


def rounded_to_bf16(builder: Any, values: Any) -> Any:
    """Finite float32 `values`, rounded to the nearest bf16, ties to even, as float32."""
    bits = builder.bitcast(values, ir.VectorType(INT, lanes(values)))
    odd = builder.and_(builder.lshr(bits, same(bits, 16)), same(bits, 1))
    raised = builder.add(builder.add(bits, same(bits, 0x7FFF)), odd)
    return builder.bitcast(builder.and_(raised, same(bits, 0xFFFF0000)), values.type)


def stored_as_bf16(builder: Any, values: Any) -> Any:
    """Float32 `values` as the bits of the nearest bf16, ties to even; what is no number stays none."""
    halves = ir.VectorType(ir.IntType(16), lanes(values))
    bits = builder.bitcast(rounded_to_bf16(builder, values), ir.VectorType(INT, lanes(values)))
    rounded = builder.trunc(builder.lshr(bits, same(bits, 16)), halves)
    none = builder.fcmp_unordered("uno", values, values)
    return builder.select(none, same(rounded, 0x7FC0), rounded)


def exponential(builder: Any, values: Any) -> Any:
    """e to the power of float32 `values` ≤ 0, to the last bit or two (Cephes' polynomial).

    Below `SMALLEST` it is that of `SMALLEST`.
    """
    kind = values.type

    def number(value: float) -> Any:
        return same(values, value)

    low = builder.fcmp_ordered("<", values, number(SMALLEST))
    x = builder.select(low, number(SMALLEST), values)
    floor = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(kind, [kind]), f"llvm.floor.v{lanes(values)}f32"
    )
    twos = builder.call(floor, [multiply_add(builder, x, number(1.44269504), number(0.5))])
    rest = multiply_add(builder, twos, number(2.12194440e-4), multiply_add(builder, twos, number(-0.693359375), x))
    power = number(EXPONENTIAL[0])
    for factor in EXPONENTIAL[1:]:
        power = multiply_add(builder, power, rest, number(factor))
    found = builder.fadd(multiply_add(builder, builder.fmul(power, rest), rest, rest), number(1.0))
    whole = builder.fptosi(twos, ir.VectorType(INT, lanes(values)))
    scale = builder.shl(builder.add(whole, same(whole, 127)), same(whole, 23))
    return builder.fmul(found, builder.bitcast(scale, kind))


EXPONENTIAL = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
"""Factors of the polynomial."""
SMALLEST = -87.0
"""The logarithm of about the smallest normal float32."""


def rounded_to_fp16(builder: Any, values: Any) -> Any:
    """Float32 `values`, rounded to fp16, as float32."""
    return builder.fpext(builder.fptrunc(values, ir.VectorType(HALF, lanes(values))), values.type)


def function_of(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    """LLVM's function `name` for `arguments`, types of which the last is the vector that ends its name."""
    vector = arguments[-1]
    element = "f32" if vector.element == SINGLE else f"i{vector.element.width}"
    kind = ir.FunctionType(result, arguments)
    return cgutils.get_or_insert_function(builder.module, kind, f"{name}.v{vector.count}{element}")


def _mask(places: Any) -> Any:
    found = list(places)
    return ir.Constant(ir.VectorType(INT, len(found)), found)
