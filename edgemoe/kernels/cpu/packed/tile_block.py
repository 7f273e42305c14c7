"""Products of a few rows of float32 with many tokens, as LLVM code: sums stay in registers, inputs in the first cache.

The columns are taken in pieces, and a token's sums wait in memory from one piece to the next: the rows of a piece stay
in the first cache for all tokens.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils

from edgemoe.kernels.cpu.dot_block import Block, Dot, Sums
from edgemoe.kernels.cpu.vector_ir import SINGLE, WORD, counting, in_portions, load, offset, store

PIECE = 512
"""Columns of a piece: a multiple of those of a turn of every partial sum."""
TURN = 16
"""Columns of a turn of one partial sum, in registers of any width."""
TOKENS = 2
"""Tokens of a block: with two partial sums of each product there are registers for as many."""


class TileBlock(Block):
    """Emits the products of `rows` rows, which lie in a tile, with any number of tokens."""

    def emit_all(self, rows: int, tile: Any, scratch: Any, values: Any, results: Any, tokens: Any) -> None:
        """All addresses: of the tile, of `scratch_values` float32, and of the first token's inputs and result.

        Columns are a multiple of a `TURN`. `scratch` is overwritten.
        """
        builder = self._builder
        with counting(builder, WORD(0), self._columns, PIECE) as start:
            stop = builder.add(start, WORD(PIECE))
            stop = builder.select(builder.icmp_signed("<", stop, self._columns), stop, self._columns)

            def piece(token: Any, count: int) -> None:
                kept = builder.add(scratch, builder.mul(token, WORD(4 * scratch_values(self._dot, rows, 1))))
                x = builder.add(values, builder.mul(token, self.x_step))
                out = builder.add(results, builder.mul(token, self.out_step))
                self._piece(rows, count, (start, stop), tile, kept, x, out)

            in_portions(builder, WORD(0), tokens, TOKENS, piece)

    def _piece(
        self, rows: int, tokens: int, columns: tuple[Any, Any], tile: Any, scratch: Any, values: Any, results: Any
    ) -> None:
        """The `columns`, from the first to the second, of a few tokens. The last piece stores the results."""
        builder, dot, (start, stop) = self._builder, self._dot, columns
        row_bases, token_bases = self._steps(tile, self.row_step, rows), self.token_bases(values, tokens)
        places = self._places(rows, tokens, scratch)
        sums = self._loaded(places, builder.icmp_signed("==", start, WORD(0)))
        round_ = [own for own in sums for _ in range(TURN // dot.values)]
        whole = builder.sub(stop, builder.srem(stop, WORD(TURN * len(sums))))
        self._multiply((start, whole, TURN * len(sums)), round_, row_bases, token_bases)
        self._multiply((whole, stop, TURN), round_[: TURN // dot.values], row_bases, token_bases)
        with builder.if_else(builder.icmp_signed("==", stop, self._columns)) as (ends, goes_on):
            with ends:
                self.store(self.totals(sums), results)
            with goes_on:
                for place, own in zip(_each(places), _each(sums), strict=True):
                    store(builder, builder.load(own), place)

    def _places(self, rows: int, tokens: int, scratch: Any) -> Sums:
        """The addresses of a few tokens' sums, by part, row and token."""
        lanes, parts = self._dot.lanes, self._dot.partial_sums

        def place(part: int, row: int, token: int) -> Any:
            return offset(self._builder, scratch, 4 * lanes * ((token * parts + part) * rows + row))

        return [[[place(part, row, token) for token in range(tokens)] for row in range(rows)] for part in range(parts)]

    def _loaded(self, places: Sums, begins: Any) -> Sums:
        """Where the sums at `places` are kept; they are 0 where it `begins`."""
        builder, vector = self._builder, ir.VectorType(SINGLE, self._dot.lanes)
        zero = ir.Constant(vector, [0.0] * self._dot.lanes)

        def kept(place: Any) -> Any:
            found = load(builder, place, vector, align=4)
            return cgutils.alloca_once_value(builder, builder.select(begins, zero, found))

        return [[[kept(place) for place in row] for row in part] for part in places]


def _each(sums: Sums) -> list[Any]:
    return [own for part in sums for row in part for own in row]


def scratch_values(dot: Dot, rows: int, tokens: int) -> int:
    """Float32 values of the memory in which the sums of `tokens` tokens wait."""
    return dot.lanes * dot.partial_sums * rows * tokens
