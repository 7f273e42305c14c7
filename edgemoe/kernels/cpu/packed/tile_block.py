"""Products of a few rows of float32 with many tokens, as LLVM code: sums stay in registers, inputs in the first cache.

The columns are taken in pieces, and a token's sums wait in memory from one piece to the next: the rows of a piece stay
in the first cache for all tokens.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils

from edgemoe.kernels.cpu.dot_block import Block
from edgemoe.kernels.cpu.vector_ir import SINGLE, WORD, counting, in_portions, load, store

PIECE = 512
"""Columns of a piece: a multiple of every width of a register."""


class TileBlock(Block):
    """Emits the products of `rows` rows, which lie in a tile, with any number of tokens. One sum for each product."""

    def emit_all(self, rows: int, tile: Any, scratch: Any, values: Any, results: Any, tokens: Any) -> None:
        """All addresses: of the tile, of `rows` vectors for each of the `tokens`, and of the first token's and result.

        Columns are a multiple of the width of a register. `scratch` is overwritten.
        """
        builder = self._builder
        with counting(builder, WORD(0), self._columns, PIECE) as start:
            stop = builder.add(start, WORD(PIECE))
            stop = builder.select(builder.icmp_signed("<", stop, self._columns), stop, self._columns)

            def piece(token: Any, count: int) -> None:
                kept = builder.add(scratch, builder.mul(token, WORD(rows * self._dot.lanes * 4)))
                x = builder.add(values, builder.mul(token, self.x_step))
                out = builder.add(results, builder.mul(token, self.out_step))
                self._piece(rows, count, start, stop, tile, kept, x, out)

            in_portions(builder, WORD(0), tokens, self._dot.tokens, piece)

    def _piece(
        self, rows: int, tokens: int, start: Any, stop: Any, tile: Any, scratch: Any, values: Any, results: Any
    ) -> None:
        """The columns `start` ≤ c < `stop` of a few tokens. The last piece stores the results."""
        builder, dot = self._builder, self._dot
        row_bases, token_bases = self._steps(tile, self.row_step, rows), self.token_bases(values, tokens)
        vector = ir.VectorType(SINGLE, dot.lanes)
        width = dot.lanes * 4
        places = [
            [builder.add(scratch, WORD((token * rows + row) * width)) for token in range(tokens)] for row in range(rows)
        ]
        begins = builder.icmp_signed("==", start, WORD(0))
        zero = ir.Constant(vector, [0.0] * dot.lanes)
        sums = [
            [
                cgutils.alloca_once_value(builder, builder.select(begins, zero, load(builder, place, vector, align=4)))
                for place in own
            ]
            for own in places
        ]
        self._multiply(start, stop, [sums], row_bases, token_bases)
        with builder.if_else(builder.icmp_signed("==", stop, self._columns)) as (ends, goes_on):
            with ends:
                self.store(self.totals([sums]), results)
            with goes_on:
                for own, kept in zip(places, sums, strict=True):
                    for place, each in zip(own, kept, strict=True):
                        store(builder, builder.load(each), place)
