"""Products of packed weight rows with tokens in 16-bit integers, as LLVM code: sums are float32.

Integers are multiplied and added exactly, 16 or 32 at a time, where floats would first have to be made of codes: a
quarter of the work for one token. What a lane adds up for one scale stays below 2^24, so that its float32 is exact too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from edgemoe.kernels.cpu.cpu_features import is_x86
from edgemoe.kernels.cpu.dot_block import AHEAD, LINE, WORDS, Operands, reduced
from edgemoe.kernels.cpu.packed.int16_codes import Codes, width
from edgemoe.kernels.cpu.packed.int16_inputs import Token
from edgemoe.kernels.cpu.vector_ir import (
    INT,
    SINGLE,
    WORD,
    counting,
    in_portions,
    load,
    multiply_add,
    native_loop,
    offset,
    part,
    prefetch,
    splat,
    store,
)

TOGETHER = {32: 8, 16: 4}
"""Tokens whose sums are kept in registers, by the integers in one of these."""


def int16_dots(codes: Codes) -> Callable[..., None]:
    """A numba intrinsic with the arguments of `int16_kernels.int16_q8_0`."""

    def emit(builder: Any, job: Any, scratch: Any, first: Any, last: Any) -> None:
        parts = load(builder, offset(builder, job, 8 * WORDS), WORD, align=8)
        _Int16Dots(builder, codes, Operands.of(builder, job, first, last), parts).emit()

    return native_loop(emit)


class _Int16Dots:
    """Emits the loops over groups, rows and tokens."""

    def __init__(self, builder: Any, codes: Codes, operands: Operands, place: Any) -> None:
        """`place` is that of the weights in a record, in bytes."""
        self._builder, self._codes, self._operands, self._place = builder, codes, operands, place
        self._token = Token(builder, codes.layout, operands.columns)
        self._units = builder.udiv(operands.columns, WORD(codes.layout.unit))
        self._row_nbytes = builder.mul(self._units, WORD(codes.nbytes))
        self._lanes = ir.VectorType(SINGLE, width() // 2)

    def emit(self) -> None:
        """Emits everything."""
        builder, of = self._builder, self._operands
        for record, values, results, tokens in of.each_group(builder):
            matrix = builder.add(record, self._place)

            def run(token: Any, count: int, matrix: Any = matrix, values: Any = values, results: Any = results) -> None:
                x = builder.add(values, builder.mul(token, of.x_step))
                out = builder.add(results, builder.mul(token, of.out_step))
                with counting(builder, of.first, of.last, 1) as row:
                    weights = builder.add(matrix, builder.mul(row, self._row_nbytes))
                    self._row(weights, x, builder.add(out, builder.mul(row, WORD(4))), count)

            in_portions(builder, WORD(0), tokens, TOGETHER[width()], run)

    def _row(self, weights: Any, x: Any, out: Any, tokens: int) -> None:
        """The products of one row with a few tokens, the first of which is at the address `x`, to `out`."""
        builder, of = self._builder, self._operands
        bases = [builder.add(x, builder.mul(of.x_step, WORD(token))) for token in range(tokens)]
        totals = [cgutils.alloca_once_value(builder, ir.Constant(self._lanes, [0.0] * (width() // 2))) for _ in bases]
        with counting(builder, WORD(0), self._units, 1) as unit:
            address = builder.add(weights, builder.mul(unit, WORD(self._codes.nbytes)))
            for line in range(0, self._codes.nbytes, LINE):
                prefetch(builder, offset(builder, address, AHEAD + line))
            sums = self._unit(address, unit, bases)
            for base, own, total in zip(bases, sums, totals, strict=True):
                factor = load(builder, self._token.factor(base, unit), SINGLE, align=4)
                scaled = splat(builder, factor, width() // 2)
                builder.store(multiply_add(builder, own, scaled, builder.load(total)), total)
        for token, total in enumerate(totals):
            place = builder.add(out, builder.mul(of.out_step, WORD(token)))
            store(builder, reduced(builder, builder.load(total)), place)

    def _unit(self, address: Any, unit: Any, bases: Sequence[Any]) -> list[Any]:
        """The sums of one unit of columns for each token, in lanes, before the tokens' factors."""
        builder = self._builder
        sets, lows = self._codes.emit(builder, address)
        values = [self._token.values(base, unit) for base in bases]
        sums: list[Any] = [None] * len(bases)
        if lows is not None:
            sums = [self._lowest(lows, self._token.sums(base, unit)) for base in bases]
        at = 0
        for scale, vectors in sets:
            for token, base in enumerate(values):
                product = self._product(vectors, offset(builder, base, 2 * at))
                found = builder.sitofp(product, self._lanes)
                own = sums[token]
                sums[token] = builder.fmul(found, scale) if own is None else multiply_add(builder, found, scale, own)
            at += len(vectors) * width()
        return sums

    def _lowest(self, lows: Any, address: Any) -> Any:
        """The products of `lows` with the sums at `address`, in lanes."""
        builder, lanes = self._builder, width() // 2
        sums = load(builder, address, lows.type, align=4)
        if lows.type.count == lanes:
            return builder.fmul(lows, sums)
        (low, sum_), (other, others) = ([part(builder, each, at, lanes) for each in (lows, sums)] for at in (0, lanes))
        return multiply_add(builder, other, others, builder.fmul(low, sum_))

    def _product(self, codes: Sequence[Any], inputs: Any) -> Any:
        """The products of vectors of integers with the inputs at the address `inputs`, added up in lanes of 32 bits."""
        builder = self._builder
        total = None
        for number, own in enumerate(codes):
            value = load(builder, offset(builder, inputs, 2 * width() * number), own.type, align=2)
            product = pairs(builder, own, value)
            total = product if total is None else builder.add(total, product)
        return total


def pairs(builder: Any, first: Any, second: Any) -> Any:
    """Products of two vectors of 16-bit integers, of which those of neighbours are added up, as INT."""
    lanes = ir.VectorType(INT, width() // 2)
    if is_x86():
        name = "llvm.x86.avx512.pmaddw.d.512" if width() == 32 else "llvm.x86.avx2.pmadd.wd"
        kind = ir.FunctionType(lanes, [first.type] * 2)
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [first, second])
    wide = ir.VectorType(INT, width())
    product = builder.mul(builder.sext(first, wide), builder.sext(second, wide))
    even, odd = (ir.Constant(ir.VectorType(INT, width() // 2), list(range(begin, width(), 2))) for begin in (0, 1))
    return builder.add(builder.shuffle_vector(product, product, even), builder.shuffle_vector(product, product, odd))
