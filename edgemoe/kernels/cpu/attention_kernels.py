"""Attention of single tokens on CPUs, as LLVM code. A token's output is one sum in one order, whatever comes with it.

Query heads that share a key head are computed together, a few at a time: a key, or a value, is read and widened once
for them. Sums are float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from llvmlite import ir
from numba.core import cgutils

from edgemoe.cache.compiled import Native
from edgemoe.kernels.cpu.dot_block import Widened, reduced
from edgemoe.kernels.cpu.vector_ir import (
    INT,
    SINGLE,
    WORD,
    counting,
    exponential,
    load,
    load_words,
    native_loop,
    offset,
    row_blocks,
    splat,
    store,
    stored_as_bf16,
)

HEADS = {16: 4, 8: 2}
"""Query heads that are computed at a time, by the lanes of a register: as many as there is room for."""
VECTORS = 4
"""Registers of a value's row that are summed at a time."""


class Words(NamedTuple):
    """What `attend_bf16` reads at the address of its job, a word of 64 bits each: addresses, counts, and bytes."""

    q: Any
    k: Any
    v: Any
    out: Any
    group: Any
    """Query heads that share a key head."""
    tokens: Any
    width: Any
    """Values of a key."""
    depth: Any
    """Values of a value."""
    q_head: Any
    """Bytes from one head to the next, and so on."""
    q_token: Any
    k_head: Any
    k_token: Any
    v_head: Any
    v_token: Any
    out_head: Any
    out_token: Any
    spans: Any
    """Two whole numbers a token: the first of the keys that it sees, and the end of these."""
    places: Any
    """Single keys that tokens see after those."""
    starts: Any
    """Where a token's begin, and the end of the last one's."""
    padded: Any
    """How many scores of a head there is room for: as many registers full as hold the most keys of a token."""
    scale: Any
    """What products of queries and keys are multiplied by: the bits of a float32."""


def _attention(kind: str) -> Callable[..., None]:
    """A numba intrinsic with the arguments of `attend_bf16`, for tensors of `kind`, `bf16` or `f32`."""

    def emit(builder: Any, job: Any, scratch: Any, first: Any, last: Any) -> None:
        words = Words._make(load_words(builder, job, len(Words._fields)))
        _Attention(builder, kind, words, scratch).emit(first, last)

    return native_loop(emit)


_of_bf16, _of_f32 = _attention("bf16"), _attention("f32")


@Native
def attend_bf16(job, scratch, first, last):  # type: ignore[no-untyped-def]
    """Attention of the items first ≤ i < last, each a key head and a token: item `head * tokens + token`.

    `job` is the address of `Words`, and `scratch` that of `group * (padded + width)` float32, which are overwritten.
    Keys and values are whole registers wide.
    """
    _of_bf16(job, scratch, first, last)


@Native
def attend_f32(job, scratch, first, last):  # type: ignore[no-untyped-def]
    """As `attend_bf16` for float32."""
    _of_f32(job, scratch, first, last)


class _Seen(NamedTuple):
    """The keys that one token sees, as LLVM values."""

    begin: Any
    near: Any
    """The first of those side by side, and their number."""
    places: Any
    others: Any
    """The address of the single ones, and their number."""


class _Attention:
    """Emits the loops over items, heads and keys."""

    def __init__(self, builder: Any, kind: str, words: Words, scratch: Any) -> None:
        self._builder = builder
        self._rounds = kind == "bf16"
        self._of = words
        self._dot = Widened(kind)
        self._shares = scratch
        room = builder.mul(words.group, builder.mul(words.padded, WORD(4)))
        self._queries = builder.add(scratch, room)
        self._scale = builder.bitcast(builder.trunc(words.scale, INT), SINGLE)

    def emit(self, first: Any, last: Any) -> None:
        """All items."""
        builder, of = self._builder, self._of
        with counting(builder, first, last, 1) as item:
            head, token = builder.udiv(item, of.tokens), builder.urem(item, of.tokens)
            seen = self._seen(token)
            query_head = builder.mul(head, of.group)
            queries = self._at(of.q, (query_head, of.q_head), (token, of.q_token))
            keys, values = self._at(of.k, (head, of.k_head)), self._at(of.v, (head, of.v_head))
            out = self._at(of.out, (query_head, of.out_head), (token, of.out_token))
            self._widen_queries(queries)
            for query, heads in row_blocks(builder, WORD(0), of.group, HEADS[self._dot.lanes]):
                self._score(query, heads, seen, keys)
                for number in range(heads):
                    self._softmax(builder.add(query, WORD(number)), seen)
                vectors = builder.udiv(of.depth, WORD(self._dot.lanes))
                for vector, count in row_blocks(builder, WORD(0), vectors, VECTORS):
                    self._sum(query, heads, vector, count, seen, values, out)

    def _seen(self, token: Any) -> _Seen:
        builder, of = self._builder, self._of
        begin, end = (self._word(of.spans, builder.add(builder.mul(token, WORD(2)), WORD(at))) for at in range(2))
        single, stop = (self._word(of.starts, builder.add(token, WORD(at))) for at in range(2))
        places = self._at(of.places, (single, WORD(8)))
        return _Seen(begin, builder.sub(end, begin), places, builder.sub(stop, single))

    def _each_key(self, seen: _Seen, rows: Any, step: Any) -> Iterator[tuple[Any, Any]]:
        """Loops over the keys that are seen: their numbers among these, and the addresses of their rows."""
        builder = self._builder
        with counting(builder, WORD(0), seen.near, 1) as number:
            yield number, self._at(rows, (builder.add(seen.begin, number), step))
        with counting(builder, WORD(0), seen.others, 1) as number:
            place = self._word(seen.places, number)
            yield builder.add(seen.near, number), self._at(rows, (place, step))

    def _widen_queries(self, queries: Any) -> None:
        builder, of = self._builder, self._of
        with counting(builder, WORD(0), of.group, 1) as query:
            row, into = self._at(queries, (query, of.q_head)), self._query(query)
            with counting(builder, WORD(0), of.width, self._dot.lanes) as column:
                store(builder, self._dot.weights(builder, self._value(row, column)), self._single(into, column))

    def _score(self, query: Any, heads: int, seen: _Seen, keys: Any) -> None:
        """The products of `heads` queries with all keys, times the scale."""
        builder, dot = self._builder, self._dot
        queries = [self._query(builder.add(query, WORD(number))) for number in range(heads)]
        shares = [self._share(builder.add(query, WORD(number))) for number in range(heads)]
        for key, row in self._each_key(seen, keys, self._of.k_token):
            sums = self._zeros(heads)
            with counting(builder, WORD(0), self._of.width, dot.lanes) as column:
                weights = dot.weights(builder, self._value(row, column))
                for own, total in zip(queries, sums, strict=True):
                    value = dot.inputs(builder, self._single(own, column))
                    builder.store(dot.add(builder, builder.load(total), weights, value), total)
            for into, total in zip(shares, sums, strict=True):
                store(
                    builder, builder.fmul(reduced(builder, builder.load(total)), self._scale), self._single(into, key)
                )

    def _softmax(self, query: Any, seen: _Seen) -> None:
        """Replaces the scores of one query by their exponentials, divided by the sum of all.

        The last register is filled with scores whose exponentials vanish beside the largest one's, which is 1.
        """
        builder, width = self._builder, self._dot.lanes
        shares, count = self._share(query), builder.add(seen.near, seen.others)
        lowest = ir.Constant(SINGLE, -1e30)
        full = builder.mul(builder.udiv(builder.add(count, WORD(width - 1)), WORD(width)), WORD(width))
        with counting(builder, count, full, 1) as place:
            store(builder, lowest, self._single(shares, place))
        vector = ir.VectorType(SINGLE, width)
        most = cgutils.alloca_once_value(builder, ir.Constant(vector, [-1e30] * width))
        with counting(builder, WORD(0), full, width) as place:
            found = load(builder, self._single(shares, place), vector, align=4)
            largest = builder.load(most)
            builder.store(builder.select(builder.fcmp_ordered(">", found, largest), found, largest), most)
        top = splat(builder, self._largest(builder.load(most)), width)
        total = self._zeros(1)[0]
        with counting(builder, WORD(0), full, width) as place:
            address = self._single(shares, place)
            found = exponential(builder, builder.fsub(load(builder, address, vector, align=4), top))
            store(builder, found, address)
            builder.store(builder.fadd(builder.load(total), found), total)
        one = ir.Constant(SINGLE, 1.0)
        share = splat(builder, builder.fdiv(one, reduced(builder, builder.load(total))), width)
        with counting(builder, WORD(0), full, width) as place:
            address = self._single(shares, place)
            store(builder, builder.fmul(load(builder, address, vector, align=4), share), address)

    def _sum(self, query: Any, heads: int, vector: Any, count: int, seen: _Seen, values: Any, out: Any) -> None:
        """`count` registers, from number `vector` on, of the outputs of `heads` queries: sums of values, key by key."""
        builder, of, dot = self._builder, self._of, self._dot
        column = builder.mul(vector, WORD(dot.lanes))
        shares = [self._share(builder.add(query, WORD(number))) for number in range(heads)]
        sums = [self._zeros(count) for _ in range(heads)]
        for key, row in self._each_key(seen, values, of.v_token):
            address = self._value(row, column)
            found = [
                dot.weights(builder, offset(builder, address, at * dot.lanes * dot.weight_nbytes))
                for at in range(count)
            ]
            for own, totals in zip(shares, sums, strict=True):
                share = splat(builder, load(builder, self._single(own, key), SINGLE, align=4), dot.lanes)
                for weights, total in zip(found, totals, strict=True):
                    builder.store(dot.add(builder, builder.load(total), weights, share), total)
        for number, totals in enumerate(sums):
            row = self._at(out, (builder.add(query, WORD(number)), of.out_head))
            for at, total in enumerate(totals):
                result = builder.load(total)
                result = stored_as_bf16(builder, result) if self._rounds else result
                place = builder.add(column, WORD(at * dot.lanes))
                store(builder, result, self._value(row, place), align=2)

    def _largest(self, vector: Any) -> Any:
        """The largest of the values of `vector`."""
        builder = self._builder
        kind = ir.FunctionType(SINGLE, [vector.type])
        name = f"llvm.vector.reduce.fmax.v{self._dot.lanes}f32"
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [vector])

    def _zeros(self, count: int) -> list[Any]:
        zero = ir.Constant(ir.VectorType(SINGLE, self._dot.lanes), [0.0] * self._dot.lanes)
        return [cgutils.alloca_once_value(self._builder, zero) for _ in range(count)]

    def _query(self, number: Any) -> Any:
        """The address of a widened query."""
        return self._at(self._queries, (number, self._builder.mul(self._of.width, WORD(4))))

    def _share(self, number: Any) -> Any:
        """The address of the scores of a query, later its shares of the values."""
        return self._at(self._shares, (number, self._builder.mul(self._of.padded, WORD(4))))

    def _value(self, row: Any, column: Any) -> Any:
        return self._at(row, (column, WORD(self._dot.weight_nbytes)))

    def _single(self, row: Any, column: Any) -> Any:
        return self._at(row, (column, WORD(4)))

    def _at(self, base: Any, *steps: tuple[Any, Any]) -> Any:
        """The address that lies so many times so many bytes behind `base`."""
        for number, nbytes in steps:
            base = self._builder.add(base, self._builder.mul(number, nbytes))
        return base

    def _word(self, words: Any, number: Any) -> Any:
        return load(self._builder, self._at(words, (number, WORD(8))), WORD, align=8)
