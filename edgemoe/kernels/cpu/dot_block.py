"""Dot products of weight rows with tokens, as LLVM vector code: blocks of rows and tokens that share their loads.

Several tokens take little longer than one: the weights from memory are the bottleneck. Every output is one sum in one
order, whatever block it is computed in: batch-invariant. Sums are float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import cgutils

from edgemoe.kernels.cpu.cpu_features import float_lanes, has, is_x86
from edgemoe.kernels.cpu.vector_ir import (
    SINGLE,
    WORD,
    counting,
    in_portions,
    load,
    load_words,
    multiply_add,
    native_loop,
    offset,
    prefetch,
    row_blocks,
)

ROWS = {16: 3, 8: 2}
"""Rows of a block, which share what they load, by the lanes of a register: as many as there is room for.

They are for more tokens than a block takes. Few tokens wait for memory, and take one row after the other: an AMD Zen 4
reads rows that lie side by side, several at a time, at half the speed."""
AHEAD, LINE = 4096, 64
"""Bytes from what is multiplied to what is asked for, about what memory delivers meanwhile, and of a cache line."""


class Dot(Protocol):
    """How weights and inputs are loaded and multiplied."""

    values: int
    """Values that one step multiplies."""
    lanes: int
    """Float32 partial sums of a step."""
    weight_nbytes: int
    input_nbytes: int
    """Bytes of a value."""
    tokens: int
    """Most tokens of a block: as many as there are registers for."""
    partial_sums: int
    """Sums per dot product, whose steps take turns, to hide the latency of the instructions. In every block so many."""

    @property
    def single(self) -> Callable[[Any, Any], Any] | None:
        """Of a builder and an address: the weight there as a float32, for the end of a row that is no whole step.

        None where every row is whole steps.
        """

    def weights(self, builder: Any, address: Any) -> Any:
        """The `values` weights at `address`, as `add` takes them."""

    def inputs(self, builder: Any, address: Any) -> Any:
        """The `values` inputs at `address`."""

    def add(self, builder: Any, total: Any, weights: Any, inputs: Any) -> Any:
        """`total`, a vector of `lanes`, with the products added."""


class PairsOfBf16:
    """VDPBF16PS, the instruction of AVX512-BF16: pairs of bf16, half of the work of widening them to float32.

    Products are exact, and subnormals count as zero (Intel's definition of the instruction).
    """

    values, lanes, weight_nbytes, input_nbytes, tokens, partial_sums = 32, 16, 2, 2, 4, 2
    single: Callable[[Any, Any], Any] | None = None

    def __init__(self) -> None:
        self._pairs = ir.VectorType(ir.IntType(32), 16)
        lanes = ir.VectorType(SINGLE, 16)
        kind = ir.FunctionType(lanes, [lanes, self._pairs, self._pairs])
        self._instruction = ir.InlineAsm(kind, "vdpbf16ps $3, $2, $0", "=v,0,v,v", False)

    @staticmethod
    def available() -> bool:
        """Whether the CPU has the instruction."""
        return has("avx512bf16")

    def weights(self, builder: Any, address: Any) -> Any:
        """See `Dot`."""
        return load(builder, address, self._pairs)

    inputs = weights

    def add(self, builder: Any, total: Any, weights: Any, inputs: Any) -> Any:
        """See `Dot`."""
        return builder.call(self._instruction, [total, weights, inputs])


class Widened:
    """Weights of any float type, widened to float32 and multiplied by float32 inputs: AVX2, AVX512, NEON."""

    input_nbytes = 4

    def __init__(self, kind: str, partial_sums: int = 2) -> None:
        """`kind` is `bf16`, `f16` or `f32`."""
        self._kind = kind
        self.partial_sums = partial_sums
        self.weight_nbytes = 4 if kind == "f32" else 2
        self.lanes = self.values = float_lanes()
        self.tokens = 4 if self.lanes == 16 else 3
        self._vector = ir.VectorType(SINGLE, self.lanes)

    @staticmethod
    def available(kind: str) -> bool:
        """Whether the CPU can widen weights of that kind."""
        return kind != "f16" or has("f16c") or not is_x86()

    def weights(self, builder: Any, address: Any) -> Any:
        """See `Dot`."""
        return self.widened(builder, address, self.lanes)

    def single(self, builder: Any, address: Any) -> Any:
        """See `Dot`."""
        return builder.extract_element(self.widened(builder, address, 1), ir.IntType(32)(0))

    def inputs(self, builder: Any, address: Any) -> Any:
        """See `Dot`."""
        return load(builder, address, self._vector)

    def add(self, builder: Any, total: Any, weights: Any, inputs: Any) -> Any:
        """See `Dot`."""
        return multiply_add(builder, weights, inputs, total)

    def widened(self, builder: Any, address: Any, lanes: int) -> Any:
        """The `lanes` weights at `address` as float32."""
        singles = ir.VectorType(SINGLE, lanes)
        if self._kind == "f32":
            return load(builder, address, singles)
        if self._kind == "f16":
            return builder.fpext(load(builder, address, ir.VectorType(ir.HalfType(), lanes)), singles)
        words = ir.VectorType(ir.IntType(32), lanes)
        halves = builder.zext(load(builder, address, ir.VectorType(ir.IntType(16), lanes)), words)
        return builder.bitcast(builder.shl(halves, ir.Constant(words, [16] * lanes)), singles)


if PairsOfBf16.available():
    llvm.initialize_native_asmparser()


def grouped_dots(dot: Dot) -> Callable[..., None]:
    """A numba intrinsic with the arguments of `gemv_kernels.grouped_gemv_bf16`."""

    def emit(builder: Any, job: Any, tile: Any, first: Any, last: Any) -> None:
        Grouped(builder, dot, Operands.of(builder, job, first, last)).emit()

    return native_loop(emit)


class Operands(NamedTuple):
    """What the loops run over, as LLVM values: addresses, and bytes from one slot, token or result to the next.

    All but the rows come from the words of an `arrays.Job`, in this order.
    """

    slots: Any
    starts: Any
    groups: Any
    """How many groups of tokens there are."""
    matrix: Any
    """The matrix in slot 0."""
    slot_step: Any
    x: Any
    x_step: Any
    out: Any
    out_step: Any
    columns: Any
    first: Any
    last: Any

    @classmethod
    def of(cls, builder: Any, job: Any, first: Any, last: Any) -> Operands:
        """Reads the words at the address `job`."""
        return cls._make([*load_words(builder, job, WORDS), first, last])

    def each_group(self, builder: Any) -> Iterator[tuple[Any, Any, Any, Any]]:
        """A loop over the groups, whose body the caller emits.

        Gives the addresses of a group's matrix, its first token's inputs and results, and its number of tokens.
        """
        with counting(builder, WORD(0), self.groups, 1) as group:
            place = builder.mul(group, WORD(8))
            slot = load(builder, builder.add(self.slots, place), WORD, align=8)
            start = load(builder, builder.add(self.starts, place), WORD, align=8)
            stop = load(builder, builder.add(self.starts, builder.add(place, WORD(8))), WORD, align=8)
            matrix = builder.add(self.matrix, builder.mul(slot, self.slot_step))
            values = builder.add(self.x, builder.mul(start, self.x_step))
            results = builder.add(self.out, builder.mul(start, self.out_step))
            yield matrix, values, results, builder.sub(stop, start)


WORDS = 10
"""Of a job before the offsets of the matrix's parts."""


class Grouped:
    """Emits the loops over groups, rows and tokens."""

    def __init__(self, builder: Any, dot: Dot, operands: Operands) -> None:
        self._builder = builder
        self._dot = dot
        self._operands = operands

    def emit(self) -> None:
        """Emits everything."""
        builder, of = self._builder, self._operands
        row_step = builder.mul(of.columns, WORD(self._dot.weight_nbytes))
        block = Block(builder, self._dot, row_step, of.x_step, of.out_step, of.columns)
        for group in of.each_group(builder):
            self._group(block, *group)

    def _group(self, block: Block, matrix: Any, values: Any, results: Any, tokens: Any) -> None:
        """The products of one matrix with its `tokens`: addresses, and their number, which is at least 1."""
        builder = self._builder
        with builder.if_else(builder.icmp_signed("<=", tokens, WORD(self._dot.tokens))) as (few, many):
            with few:
                self._rows(block, 1, matrix, values, results, tokens)
            with many:
                self._rows(block, ROWS[self._dot.lanes], matrix, values, results, tokens)

    def _rows(self, block: Block, rows: int, matrix: Any, values: Any, results: Any, tokens: Any) -> None:
        """All rows, a few at a time."""
        builder, of = self._builder, self._operands
        for row, count in row_blocks(builder, of.first, of.last, rows):
            weights = builder.add(matrix, builder.mul(row, block.row_step))
            into = builder.add(results, builder.mul(row, WORD(4)))
            self._tokens(block, (count, self._dot.tokens), weights, values, into, tokens)

    def _tokens(
        self, block: Block, shape: tuple[int, int], weights: Any, values: Any, results: Any, tokens: Any
    ) -> None:
        """All tokens. `shape` is the number of rows, and of tokens that are computed at a time."""
        builder, (rows, most) = self._builder, shape

        def run(token: Any, count: int) -> None:
            x = builder.add(values, builder.mul(token, block.x_step))
            block.emit(rows, count, weights, x, builder.add(results, builder.mul(token, block.out_step)))

        in_portions(builder, WORD(0), tokens, most, run)


Sums = list[list[list[Any]]]
"""Where the partial sums of a block are kept: some vectors of lanes for each row and token."""


class Block:
    """Emits the products of a few rows with a few tokens."""

    def __init__(self, builder: Any, dot: Dot, row_step: Any, x_step: Any, out_step: Any, columns: Any) -> None:
        """The steps are bytes from one row, or one token, to the next."""
        self._builder = builder
        self._dot = dot
        self.row_step, self.x_step, self.out_step = row_step, x_step, out_step
        self._columns = columns

    def emit(self, rows: int, tokens: int, weights: Any, values: Any, results: Any) -> None:
        """`weights`, `values` and `results` are the addresses of the first row's, token's and result's."""
        builder, dot = self._builder, self._dot
        row_bases = self._steps(weights, self.row_step, rows)
        token_bases = self.token_bases(values, tokens)
        sums = self.zeros(rows, tokens)
        wide = builder.sub(self._columns, builder.srem(self._columns, WORD(dot.values * dot.partial_sums)))
        whole = builder.sub(self._columns, builder.srem(self._columns, WORD(dot.values)))
        self._multiply(WORD(0), wide, sums, row_bases, token_bases, ahead=True)
        self._multiply(wide, whole, sums[:1], row_bases, token_bases)
        totals = self.totals(sums)
        if dot.single is not None:
            self._multiply_singly(dot.single, whole, totals, row_bases, token_bases)
        self.store(totals, results)

    def zeros(self, rows: int, tokens: int) -> Sums:
        """Places for the sums of a block, which are 0."""
        builder = self._builder
        zero = ir.Constant(ir.VectorType(SINGLE, self._dot.lanes), [0.0] * self._dot.lanes)
        return [
            [[cgutils.alloca_once_value(builder, zero) for _ in range(tokens)] for _ in range(rows)]
            for _ in range(self._dot.partial_sums)
        ]

    def totals(self, sums: Sums) -> list[list[Any]]:
        """By row and token: where the sum over the partial sums and their lanes is kept."""
        rows, tokens = len(sums[0]), len(sums[0][0])
        return [[self._total(sums, row, token) for token in range(tokens)] for row in range(rows)]

    def store(self, totals: list[list[Any]], results: Any, gap: Any = None) -> None:
        """Stores the sums of a block, of which `results` is the first one's address.

        `gap` is the number of rows from one to the next, where that is not 1.
        """
        builder = self._builder
        step = WORD(4) if gap is None else builder.mul(gap, WORD(4))
        for token, base in enumerate(self._steps(results, self.out_step, len(totals[0]))):
            for row, place in enumerate(self._steps(base, step, len(totals))):
                address = builder.inttoptr(place, SINGLE.as_pointer())
                builder.store(builder.load(totals[row][token]), address, align=4)

    def token_bases(self, values: Any, tokens: int) -> list[Any]:
        """The addresses of the inputs of `tokens` tokens, the first of which lies at `values`."""
        return self._steps(values, self.x_step, tokens)

    def _steps(self, base: Any, step: Any, count: int) -> list[Any]:
        builder = self._builder
        return [builder.add(base, builder.mul(step, WORD(number))) for number in range(count)]

    def _multiply(
        self, first: Any, stop: Any, sums: list[Any], rows: list[Any], tokens: list[Any], *, ahead: bool = False
    ) -> None:
        """Adds the products of the columns `first` ≤ c < `stop`; with `ahead` it asks memory for the next weights."""
        builder, dot = self._builder, self._dot
        nbytes = dot.values * dot.weight_nbytes
        with counting(builder, first, stop, dot.values * len(sums)) as at:
            for part, own in enumerate(sums):
                place = builder.add(at, WORD(dot.values * part))
                weight_place = builder.mul(place, WORD(dot.weight_nbytes))
                input_place = builder.mul(place, WORD(dot.input_nbytes))
                if ahead and part * nbytes % LINE == 0:
                    for base in rows:
                        prefetch(builder, offset(builder, builder.add(base, weight_place), AHEAD))
                weights = [dot.weights(builder, builder.add(base, weight_place)) for base in rows]
                inputs = [dot.inputs(builder, builder.add(base, input_place)) for base in tokens]
                for weight, row_sums in zip(weights, own, strict=True):
                    for value, into in zip(inputs, row_sums, strict=True):
                        builder.store(dot.add(builder, builder.load(into), weight, value), into)

    def _multiply_singly(
        self, single: Callable[[Any, Any], Any], first: Any, totals: list[list[Any]], rows: list[Any], tokens: list[Any]
    ) -> None:
        builder, dot = self._builder, self._dot
        with counting(builder, first, self._columns, 1) as at:
            weight_place = builder.mul(at, WORD(dot.weight_nbytes))
            input_place = builder.mul(at, WORD(dot.input_nbytes))
            for base, row_totals in zip(rows, totals, strict=True):
                weight = single(builder, builder.add(base, weight_place))
                for token, total in zip(tokens, row_totals, strict=True):
                    value = load(builder, builder.add(token, input_place), SINGLE, align=4)
                    builder.store(builder.fadd(builder.load(total), builder.fmul(weight, value)), total)

    def _total(self, sums: Sums, row: int, token: int) -> Any:
        """Where the sum over the partial sums and lanes of one result is kept."""
        builder = self._builder
        vector = builder.load(sums[0][row][token])
        for part in range(1, len(sums)):
            vector = builder.fadd(vector, builder.load(sums[part][row][token]))
        total = cgutils.alloca_once(builder, SINGLE)
        builder.store(reduced(builder, vector), total)
        return total


def reduced(builder: Any, vector: Any) -> Any:
    """The sum of the lanes of `vector`, in an order that its number of lanes decides."""
    kind = ir.FunctionType(SINGLE, [SINGLE, vector.type])
    name = f"llvm.vector.reduce.fadd.v{vector.type.count}f32"
    reduce = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(reduce, [SINGLE(-0.0), vector], fastmath=("reassoc",))
