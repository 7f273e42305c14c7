"""Products of packed weight rows with tokens, as LLVM code: rows are widened into a tile, which the dots then read.

The tile is a few rows of float32: it stays in the first caches of the CPU, so memory is read packed and once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from edgemoe.kernels.cpu.dot_block import ROWS_OF_ONE_TOKEN, Block, Grouped, Operands, Widened
from edgemoe.kernels.cpu.vector_ir import WORD, counting, load
from edgemoe.kernels.cpu.widening import Widening

TILE_ROWS = ROWS_OF_ONE_TOKEN
"""Most rows that are widened at a time for a product."""
OFFSETS, STARTS, TILE = 1, 4, 7
"""The places of these arrays among the arguments."""


def packed_dots(widening: Widening) -> Callable[..., None]:
    """A numba intrinsic with the arguments of `packed_kernels.gguf_q8_0`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def array(place: int) -> Any:
            return context.make_array(signature.args[place])(context, builder, arguments[place])

        def address(place: int) -> Any:
            return builder.ptrtoint(array(place).data, WORD)

        slots, _, columns, pool, starts, x, out, _, first, last = arguments
        plain = (slots, WORD(0), columns, pool, starts, x, out, first, last)
        kinds = [signature.args[at] for at in (0, 8, 2, 3, 4, 5, 6, 8, 9)]
        operands = Operands.of(context, builder, types.void(*kinds), plain)
        bounds = cgutils.unpack_tuple(builder, array(STARTS).shape)[0]
        _Packed(builder, widening, operands, address(OFFSETS), address(TILE), bounds).emit()
        return context.get_dummy_value()

    @intrinsic
    def packed(
        typing_context: Any,
        slots: Any,
        offsets: Any,
        columns: Any,
        pool: Any,
        starts: Any,
        x: Any,
        out: Any,
        tile: Any,
        first: Any,
        last: Any,
    ) -> Any:
        whole = types.int64
        return types.void(slots, offsets, whole, pool, starts, x, out, tile, whole, whole), generate

    return packed


class _Packed(Grouped):
    """The loops over groups, rows and tokens of packed matrices."""

    def __init__(
        self, builder: Any, widening: Widening, operands: Operands, offsets: Any, tile: Any, bounds: Any
    ) -> None:
        """`bounds` is the length of `starts`."""
        super().__init__(builder, Widened("f32"), operands)
        self._bounds = bounds
        self._widening = widening
        self._offsets = offsets
        self._tile = tile

    def emit(self) -> None:
        """See the base class; without groups the rows are only widened."""
        builder, of = self._builder, self._operands
        with builder.if_else(builder.icmp_signed("==", self._bounds, WORD(0))) as (none, some):
            with none:
                slot = load(builder, of.slots, WORD, align=8)
                matrix = builder.add(of.matrix, builder.mul(slot, of.slot_step))
                self._widen(matrix, of.first, of.last)
            with some:
                super().emit()

    def _rows(self, block: Block, rows: int, most: int, matrix: Any, values: Any, results: Any, tokens: Any) -> None:
        """See the base class: `rows` rows are widened, then multiplied."""
        builder, first, last = self._builder, self._operands.first, self._operands.last
        whole = builder.sub(last, builder.srem(builder.sub(last, first), WORD(rows)))
        for start, stop, count in ((first, whole, rows), (whole, last, 1)):
            with counting(builder, start, stop, count) as row:
                self._widen(matrix, row, builder.add(row, WORD(count)))
                into = builder.add(results, builder.mul(row, WORD(4)))
                self._tokens(block, count, most, self._tile, values, into, tokens)

    def _widen(self, matrix: Any, first: Any, last: Any) -> None:
        """Widens the rows `first` ≤ r < `last` of the record at `matrix` into the tile."""
        builder, columns, widening = self._builder, self._operands.columns, self._widening
        with counting(builder, first, last, 1) as row:
            line = builder.mul(builder.sub(row, first), builder.mul(columns, WORD(4)))
            into = builder.add(self._tile, line)
            parts = [
                builder.add(matrix, load(builder, builder.add(self._offsets, WORD(8 * number)), WORD, align=8))
                for number in range(widening.parts)
            ]
            with counting(builder, WORD(0), columns, widening.values) as column:
                widening.emit(builder, parts, columns, row, column, builder.add(into, builder.mul(column, WORD(4))))
