"""Products of packed weight rows with tokens, as LLVM code.

For few tokens weights are multiplied in the registers that they are widened in. For more, rows are widened into a tile
which the dots then read: a few rows of float32, which stay in the first caches of the CPU. Memory is read packed and
once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from edgemoe.kernels.cpu.cpu_features import float_lanes
from edgemoe.kernels.cpu.dot_block import AHEAD, LINE, WORDS, Block, Dot, Grouped, Operands, Widened
from edgemoe.kernels.cpu.packed.tile_block import TileBlock
from edgemoe.kernels.cpu.packed.widening import Widening
from edgemoe.kernels.cpu.vector_ir import (
    WORD,
    counting,
    lanes,
    load,
    load_words,
    native_loop,
    offset,
    part,
    prefetch,
    row_blocks,
    store,
)

TILE_ROWS = {16: 6, 8: 3}
"""Rows that are widened at a time for a product with many tokens, by the lanes of a register: as there is room for."""
STEP = 64
"""Fewest columns that are multiplied before the next look at where the row ends."""
FUSED_TOKENS = {16: 8, 8: 6}
"""Tokens up to which weights are multiplied in the registers that they are widened in, by the lanes of a register."""
AT_A_TIME = {16: 4, 8: 3}
"""Tokens of these that are multiplied at a time: as many as there are registers for, with those of two rows."""


def tile_values(columns: int, tokens: int) -> int:
    """Float32 values of the memory that products of a matrix with `tokens` tokens need as `tile`."""
    width = float_lanes()
    if tokens <= FUSED_TOKENS[width]:
        return 0
    return TILE_ROWS[width] * (columns + width * tokens)


def packed_dots(widening: Widening) -> Callable[..., None]:
    """A numba intrinsic with the arguments of `packed_kernels.gguf_q8_0`."""

    def emit(builder: Any, job: Any, tile: Any, first: Any, last: Any) -> None:
        _Packed(builder, widening, Operands.of(builder, job, first, last), job, tile).emit()

    return native_loop(emit)


class _Packed(Grouped):
    """The loops over groups, rows and tokens of packed matrices."""

    def __init__(self, builder: Any, widening: Widening, operands: Operands, job: Any, tile: Any) -> None:
        """`job` and `tile` are addresses."""
        super().__init__(builder, Widened("f32", partial_sums=1), operands)
        self._widening = widening
        self._offsets = offset(builder, job, 8 * WORDS)
        self._tile = tile

    def emit(self) -> None:
        """See the base class; without groups the rows are only widened."""
        builder, of = self._builder, self._operands
        with builder.if_else(builder.icmp_signed("==", of.groups, WORD(0))) as (none, some):
            with none:
                slot = load(builder, of.slots, WORD, align=8)
                matrix = builder.add(of.matrix, builder.mul(slot, of.slot_step))
                self._widen(self._parts(matrix), of.first, of.last)
            with some:
                super().emit()

    def _group(self, block: Block, matrix: Any, values: Any, results: Any, tokens: Any) -> None:
        """See the base class: weights for few tokens are multiplied as they are widened, without a tile."""
        builder, parts = self._builder, self._parts(matrix)
        with builder.if_else(builder.icmp_signed("<=", tokens, WORD(FUSED_TOKENS[self._dot.lanes]))) as (few, many):
            with few:
                self._fused(parts, values, results, tokens)
            with many:
                self._tiled(parts, values, results, tokens)

    def _fused(self, parts: Sequence[Any], values: Any, results: Any, tokens: Any) -> None:
        """All rows, two at a time, without a tile: one of the first half and one of the second.

        The CPU adds to one while the other's last sum is on its way. Side by side they would be read at half the speed.
        """
        builder, of = self._builder, self._operands
        half = builder.lshr(builder.sub(of.last, of.first), WORD(1))
        both = builder.add(of.first, half)
        block = _FusedBlock(builder, self._dot, self._widening, parts, of, half)
        for rows, first, last in ((2, of.first, both), (1, builder.add(both, half), of.last)):
            with counting(builder, first, last, 1) as row:
                into = builder.add(results, builder.mul(row, WORD(4)))
                self._tokens(block, (rows, AT_A_TIME[self._dot.lanes]), row, values, into, tokens)

    def _tiled(self, parts: Sequence[Any], values: Any, results: Any, tokens: Any) -> None:
        """All rows, a few of them widened at a time."""
        builder, of = self._builder, self._operands
        row_step, rows = builder.mul(of.columns, WORD(4)), TILE_ROWS[self._dot.lanes]
        block = TileBlock(builder, self._dot, row_step, of.x_step, of.out_step, of.columns)
        scratch = builder.add(self._tile, builder.mul(row_step, WORD(rows)))
        for row, count in row_blocks(builder, of.first, of.last, rows):
            self._widen(parts, row, builder.add(row, WORD(count)))
            into = builder.add(results, builder.mul(row, WORD(4)))
            block.emit_all(count, self._tile, scratch, values, into, tokens)

    def _parts(self, matrix: Any) -> list[Any]:
        """The addresses of the matrix's parts in the record at `matrix`."""
        builder = self._builder
        return [builder.add(matrix, each) for each in load_words(builder, self._offsets, self._widening.parts)]

    def _widen(self, parts: Sequence[Any], first: Any, last: Any) -> None:
        """Widens the rows `first` ≤ r < `last` into the tile."""
        builder, columns, widening = self._builder, self._operands.columns, self._widening
        with counting(builder, first, last, 1) as row:
            line = builder.mul(builder.sub(row, first), builder.mul(columns, WORD(4)))
            into = builder.add(self._tile, line)
            with counting(builder, WORD(0), columns, widening.values) as column:
                out = builder.add(into, builder.mul(column, WORD(4)))
                widening.emit(builder, parts, columns, row, column, partial(self._store, out))

    def _store(self, out: Any, first: int, values: Any) -> None:
        store(self._builder, values, offset(self._builder, out, 4 * first))


class _FusedBlock(Block):
    """Emits the products of a few rows with a few tokens, in whose registers the weights are widened."""

    def __init__(
        self, builder: Any, dot: Dot, widening: Widening, parts: Sequence[Any], of: Operands, gap: Any
    ) -> None:
        """`parts` are the addresses of the parts of one matrix; `gap` is the number of rows from one to the next."""
        super().__init__(builder, dot, WORD(0), of.x_step, of.out_step, of.columns)
        self._gap = gap
        self._widening = widening
        self._parts = parts

    def emit(self, rows: int, tokens: int, weights: Any, values: Any, results: Any) -> None:
        """See the base class: the same sums in the same order. `weights` is the number of the first row."""
        builder, columns, count = self._builder, self._columns, self._widening.values
        bases, sums = self.token_bases(values, tokens), self.zeros(rows, tokens)
        step = max(STEP, count)

        def emit(start: Any, first: int) -> None:
            """`count` columns from start + `first` on, which is a multiple of them."""
            column = builder.add(start, WORD(first))
            for number in range(rows):
                row = builder.add(weights, builder.mul(self._gap, WORD(number)))
                if first % STEP == 0:
                    self._prefetch(row, column)
                put = partial(self._multiply_add, sums[0][number], bases, column)
                self._widening.emit(builder, self._parts, columns, row, column, put)

        whole = builder.sub(columns, builder.srem(columns, WORD(step)))
        with counting(builder, WORD(0), whole, step) as start:
            for first in range(0, step, count):
                emit(start, first)
        for first in range(0, step - count, count):
            with builder.if_then(builder.icmp_signed("<", builder.add(whole, WORD(first)), columns)):
                emit(whole, first)
        self.store(self.totals(sums), results, self._gap)

    def _prefetch(self, row: Any, column: Any) -> None:
        """Asks for what will be read soon: decoding is too slow for the CPU to look far enough ahead by itself."""
        builder, (values, nbytes) = self._builder, self._widening.block
        place = builder.add(builder.mul(row, self._columns), column)
        at = builder.add(self._parts[0], builder.mul(builder.udiv(place, WORD(values)), WORD(nbytes)))
        covered = -(-max(STEP, self._widening.values) // values) * nbytes
        for line in range(0, covered, LINE):
            prefetch(builder, offset(builder, at, AHEAD + line))

    def _multiply_add(self, sums: Sequence[Any], bases: Sequence[Any], column: Any, first: int, weights: Any) -> None:
        """Adds the products of `weights`, those from `column` + `first` on, to the `sums` of the tokens."""
        builder, width = self._builder, self._dot.lanes
        for at in range(0, lanes(weights), width):
            own = part(builder, weights, at, width) if lanes(weights) > width else weights
            place = builder.mul(builder.add(column, WORD(first + at)), WORD(4))
            for base, into in zip(bases, sums, strict=True):
                value = self._dot.inputs(builder, builder.add(base, place))
                builder.store(self._dot.add(builder, builder.load(into), own, value), into)
