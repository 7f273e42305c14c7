"""Dot products of bf16 rows with VDPBF16PS, the instruction of AVX512-BF16.

The instruction takes pairs of bf16: 32 values for one load, half of the work of widening to float32. A block of rows
and tokens shares its loads, so several tokens take little longer than one: the weights from memory are the bottleneck.
Products are exact, sums are float32, and subnormals count as zero (Intel's definition of VDPBF16PS).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

VALUES = 32
"""Values per instruction; a row's length must be a multiple of it."""
UNROLLED = 2
"""Partial sums per dot product, to hide the instruction's latency.

The same for every block, so that a dot product is always summed in the same order: batch-invariant.
"""

WORD = ir.IntType(64)
SINGLE = ir.FloatType()
PAIRS = ir.VectorType(ir.IntType(32), 16)
LANES = ir.VectorType(SINGLE, 16)


def available() -> bool:
    """Whether this CPU has AVX512-BF16."""
    return bool(llvm.get_host_cpu_features().get("avx512bf16", False))


if available():
    llvm.initialize_native_asmparser()


def dot_block(rows: int, tokens: int) -> Callable[..., None]:
    """A numba intrinsic that computes `rows` x `tokens` dot products.

    Its arguments are int64: the addresses of the first row (bf16), of the first token's values (bf16) and of its first
    result (float32, written); the strides in bytes of rows, of tokens and of the results of a token; the number of
    values, a multiple of `VALUES`. The results of one token are contiguous.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _Block(builder, rows, tokens).emit(*arguments)
        return context.get_dummy_value()

    @intrinsic
    def block(
        typing_context: Any, row: Any, values: Any, out: Any, row_step: Any, token_step: Any, out_step: Any, count: Any
    ) -> Any:
        return types.void(*[types.int64] * 7), generate

    return block


class _Block:
    """Emits the LLVM instructions of one block."""

    def __init__(self, builder: Any, rows: int, tokens: int) -> None:
        self._builder = builder
        self._rows = rows
        self._tokens = tokens
        self._instruction = ir.InlineAsm(
            ir.FunctionType(LANES, [LANES, PAIRS, PAIRS]), "vdpbf16ps $3, $2, $0", "=v,0,v,v", False
        )

    def emit(self, row: Any, values: Any, out: Any, row_step: Any, token_step: Any, out_step: Any, count: Any) -> None:
        """Emits the loop over the values, then the sum over the lanes. Arguments as in `dot_block`."""
        builder = self._builder
        rows = self._steps(row, row_step, self._rows)
        tokens = self._steps(values, token_step, self._tokens)
        zero = ir.Constant(LANES, [0.0] * 16)
        sums = [[[cgutils.alloca_once_value(builder, zero) for _ in tokens] for _ in rows] for _ in range(UNROLLED)]
        nbytes = builder.mul(count, WORD(2))
        stride = 2 * VALUES * UNROLLED
        whole = builder.mul(builder.udiv(nbytes, WORD(stride)), WORD(stride))
        self._loop(WORD(0), whole, sums, rows, tokens)
        self._loop(whole, nbytes, sums[:1], rows, tokens)
        places = self._steps(out, out_step, self._tokens)
        for at_row in range(self._rows):
            for at_token, place in enumerate(places):
                total = builder.load(sums[0][at_row][at_token])
                for part in range(1, UNROLLED):
                    total = builder.fadd(total, builder.load(sums[part][at_row][at_token]))
                address = builder.inttoptr(builder.add(place, WORD(4 * at_row)), SINGLE.as_pointer())
                builder.store(self._across(total), address, align=4)

    def _steps(self, base: Any, step: Any, count: int) -> list[Any]:
        builder = self._builder
        return [builder.add(base, builder.mul(step, WORD(number))) for number in range(count)]

    def _loop(self, first: Any, stop: Any, sums: list[Any], rows: list[Any], tokens: list[Any]) -> None:
        builder = self._builder
        step = WORD(2 * VALUES * len(sums))
        with cgutils.for_range_slice(builder, first, stop, step, intp=WORD) as (offset, _):
            for part, own in enumerate(sums):
                place = builder.add(offset, WORD(2 * VALUES * part))
                weights = [self._load(base, place) for base in rows]
                inputs = [self._load(base, place) for base in tokens]
                for weight, row_sums in zip(weights, own, strict=True):
                    for value, into in zip(inputs, row_sums, strict=True):
                        builder.store(builder.call(self._instruction, [builder.load(into), weight, value]), into)

    def _load(self, base: Any, offset: Any) -> Any:
        builder = self._builder
        return builder.load(builder.inttoptr(builder.add(base, offset), PAIRS.as_pointer()), align=2)

    def _across(self, lanes: Any) -> Any:
        builder = self._builder
        kind = ir.FunctionType(SINGLE, [SINGLE, LANES])
        reduce = cgutils.get_or_insert_function(builder.module, kind, "llvm.vector.reduce.fadd.v16f32")
        return builder.call(reduce, [SINGLE(-0.0), lanes], fastmath=("reassoc",))
