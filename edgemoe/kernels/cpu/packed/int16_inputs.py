"""Inputs as 16-bit integers, for products with weights that are integers with a scale.

A unit of columns, 64 or 256, shares a factor: its largest magnitude becomes 32767. Rounding changes a value by 2^-16 of
that at most, so that the error of a unit is below a fifth of what rounding its values to bf16 would make of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from llvmlite import ir

from edgemoe.kernels.cpu.cpu_features import float_lanes
from edgemoe.kernels.cpu.dot_block import reduced
from edgemoe.kernels.cpu.vector_ir import (
    INT,
    SINGLE,
    WORD,
    counting,
    function_of,
    load,
    load_words,
    native_loop,
    offset,
    part,
    same,
    splat,
    store,
)

SHORT = ir.IntType(16)
LARGEST = 32767.0
SMALLEST = 1e-33
"""The largest magnitude of a unit that counts as zeros."""
GROUP = 32
"""Columns that are laid out together."""
ROUNDING = 12582912.0
"""1.5 * 2^23. A smaller float32 that is added to it is rounded to a whole number, which the lowest bits then hold."""


class Layout(NamedTuple):
    """How the integers of a token lie in memory: those of all units, then their sums, then their factors."""

    unit: int
    """Columns that share a factor."""
    places: tuple[tuple[int, ...], ...]
    """For every 32 columns of a unit, where they begin in it: in one piece, or the even ones and the odd ones."""
    summed: int = 0
    """Columns of a sum; 0 where no sums are needed."""
    times: int = 1
    """What sums are multiplied by."""
    sums: int = 0
    """Places for sums in a unit, the last of which are used; the others are 0."""

    def nbytes(self, columns: int) -> int:
        """Bytes of a token with `columns` columns, which are whole units."""
        return 2 * columns + columns // self.unit * 4 * (self.sums + 1)

    def fits(self, columns: int) -> bool:
        """Whether rows of `columns` columns are whole units."""
        return columns % self.unit == 0


class Token:
    """Where the parts of a token lie, as LLVM values."""

    def __init__(self, builder: Any, layout: Layout, columns: Any) -> None:
        self._builder, self._layout = builder, layout
        self._sums = builder.mul(columns, WORD(2))
        units = builder.udiv(columns, WORD(layout.unit))
        self._factors = builder.add(self._sums, builder.mul(units, WORD(4 * layout.sums)))
        self.nbytes = builder.add(self._factors, builder.mul(units, WORD(4)))
        """Of the token: `Layout.nbytes`."""

    def values(self, base: Any, unit: Any) -> Any:
        """The address of the integers of a unit, given by its number, of the token at `base`."""
        return self._at(base, unit, 2 * self._layout.unit)

    def sums(self, base: Any, unit: Any) -> Any:
        """The address of its sums."""
        return self._at(self._builder.add(base, self._sums), unit, 4 * self._layout.sums)

    def factor(self, base: Any, unit: Any) -> Any:
        """The address of its factor."""
        return self._at(self._builder.add(base, self._factors), unit, 4)

    def _at(self, base: Any, unit: Any, nbytes: int) -> Any:
        return self._builder.add(base, self._builder.mul(unit, WORD(nbytes)))


def rounding(layout: Layout) -> Callable[..., None]:
    """A numba intrinsic with the arguments of `int16_kernels.rounded_natural`."""

    def emit(builder: Any, job: Any, scratch: Any, first: Any, last: Any) -> None:
        x, x_step, out, columns = load_words(builder, job, 4)
        rounder = _Rounder(builder, layout, columns)
        with counting(builder, first, last, 1) as row:
            values = builder.add(x, builder.mul(row, x_step))
            rounder.emit(values, builder.add(out, builder.mul(row, rounder.token.nbytes)))

    return native_loop(emit)


class _Rounder:
    """Emits the rounding of one row."""

    def __init__(self, builder: Any, layout: Layout, columns: Any) -> None:
        self._builder, self._layout, self._columns = builder, layout, columns
        self.token = Token(builder, layout, columns)

    def emit(self, values: Any, out: Any) -> None:
        """Rounds the float32 at the address `values` to a token at `out`."""
        builder, layout = self._builder, self._layout
        with counting(builder, WORD(0), builder.udiv(self._columns, WORD(layout.unit)), 1) as unit:
            x = builder.add(values, builder.mul(unit, WORD(4 * layout.unit)))
            largest, spoiled = self._largest(x)
            usual = builder.fcmp_ordered(">", largest, SINGLE(SMALLEST))
            inverse = builder.select(usual, builder.fdiv(SINGLE(LARGEST), largest), SINGLE(0.0))
            # Where a value is infinite or none, so are the products.
            factor = builder.fadd(builder.fdiv(largest, SINGLE(LARGEST)), spoiled)
            store(builder, factor, self.token.factor(out, unit))
            into, sums = self.token.values(out, unit), self.token.sums(out, unit)
            unused = layout.sums - (layout.unit // layout.summed if layout.summed else 0)
            if unused:
                store(builder, ir.Constant(ir.VectorType(SINGLE, unused), [0.0] * unused), sums)
            for group in range(layout.unit // GROUP):
                rounded = self._rounded(offset(builder, x, 4 * GROUP * group), inverse)
                self._store(rounded, into, layout.places[group])
                if layout.summed:
                    each = GROUP // layout.summed
                    self._store_sums(rounded, offset(builder, sums, 4 * (unused + each * group)))

    def _largest(self, x: Any) -> tuple[Any, Any]:
        """The largest magnitude in a unit, and 0, or no number where a value is infinite or none."""
        builder, lanes = self._builder, float_lanes()
        kind = ir.VectorType(SINGLE, lanes)
        zero = ir.Constant(kind, [0.0] * lanes)
        most, spoiled = zero, zero
        for at in range(0, self._layout.unit, lanes):
            value = load(builder, offset(builder, x, 4 * at), kind, align=4)
            magnitude = builder.call(function_of(builder, "llvm.fabs", kind, kind), [value])
            most = builder.select(builder.fcmp_ordered(">", magnitude, most), magnitude, most)
            spoiled = builder.fadd(spoiled, builder.fmul(value, zero))
        top = builder.call(function_of(builder, "llvm.vector.reduce.fmax", SINGLE, kind), [most], fastmath=("nnan",))
        return top, reduced(builder, spoiled)

    def _rounded(self, x: Any, inverse: Any) -> Any:
        """32 values times `inverse`, to the nearest whole numbers, as INT."""
        builder = self._builder
        values = load(builder, x, ir.VectorType(SINGLE, GROUP), align=4)
        scaled = builder.fmul(values, splat(builder, inverse, GROUP))
        bits = builder.bitcast(builder.fadd(scaled, same(scaled, ROUNDING)), ir.VectorType(INT, GROUP))
        return builder.sub(bits, same(bits, 0x4B400000))

    def _store(self, rounded: Any, into: Any, places: Sequence[int]) -> None:
        """Stores 32 values as 16-bit integers, from the places of their pieces on."""
        builder = self._builder
        short = builder.trunc(rounded, ir.VectorType(SHORT, GROUP))
        for number, place in enumerate(places):
            taken = ir.Constant(ir.VectorType(INT, GROUP // len(places)), list(range(number, GROUP, len(places))))
            store(builder, builder.shuffle_vector(short, short, taken), offset(builder, into, 2 * place), align=2)

    def _store_sums(self, rounded: Any, into: Any) -> None:
        builder, layout = self._builder, self._layout
        kind = ir.VectorType(INT, layout.summed)
        whole = function_of(builder, "llvm.vector.reduce.add", INT, kind)
        for number, at in enumerate(range(0, GROUP, layout.summed)):
            total = builder.call(whole, [part(builder, rounded, at, layout.summed)])
            value = builder.sitofp(builder.mul(total, INT(layout.times)), SINGLE)
            store(builder, value, offset(builder, into, 4 * number))
