"""A dot product of bf16 rows in the one instruction that CPUs with AVX512-BF16 have for it.

Read as pairs of bf16, a row costs one load and one instruction for 32 values, half of what widening to
float32 takes; a thread then reads about as fast as its core can. Products are exact and summed in
float32 (Intel's definition of VDPBF16PS; subnormals count as zero).
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

VALUES = 32
"""Values that one instruction takes; rows must be a multiple of it."""
UNROLLED = 4
"""Independent sums, to hide the instruction's latency."""


def available() -> bool:
    """Whether this machine has the instruction."""
    return bool(llvm.get_host_cpu_features().get("avx512bf16", False))


if available():
    llvm.initialize_native_asmparser()


@intrinsic
def dot(typing_context: Any, row: Any, values: Any, count: Any) -> Any:
    """Σ row[j]·values[j] as float32: addresses of bf16 values and their count, a multiple of `VALUES`, all int64."""
    return types.float32(types.int64, types.int64, types.int64), _generate


def _generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    row, values, count = arguments
    word, single = ir.IntType(64), ir.FloatType()
    sums_type, pairs_type = ir.VectorType(single, 16), ir.VectorType(ir.IntType(32), 16)
    instruction = ir.InlineAsm(
        ir.FunctionType(sums_type, [sums_type, pairs_type, pairs_type]), "vdpbf16ps $3, $2, $0", "=v,0,v,v", False
    )
    sums = [cgutils.alloca_once_value(builder, ir.Constant(sums_type, [0.0] * 16)) for _ in range(UNROLLED)]
    nbytes = builder.mul(count, word(2))

    def add(into: Any, offset: Any) -> None:
        pointers = [builder.inttoptr(builder.add(base, offset), pairs_type.as_pointer()) for base in (row, values)]
        loaded = [builder.load(pointer, align=2) for pointer in pointers]
        builder.store(builder.call(instruction, [builder.load(into), *loaded]), into)

    def loop(first: Any, stop: Any, unrolled: int) -> None:
        step = 2 * VALUES * unrolled
        with cgutils.for_range_slice(builder, first, stop, word(step), intp=word) as (offset, _):
            for part in range(unrolled):
                add(sums[part], builder.add(offset, word(2 * VALUES * part)))

    whole = builder.mul(builder.udiv(nbytes, word(2 * VALUES * UNROLLED)), word(2 * VALUES * UNROLLED))
    loop(word(0), whole, UNROLLED)
    loop(whole, nbytes, 1)
    halves = [builder.fadd(builder.load(sums[part]), builder.load(sums[part + 2])) for part in (0, 1)]
    reduce_type = ir.FunctionType(single, [single, sums_type])
    reduce = cgutils.get_or_insert_function(builder.module, reduce_type, "llvm.vector.reduce.fadd.v16f32")
    return builder.call(reduce, [single(-0.0), builder.fadd(*halves)], fastmath=("reassoc",))
