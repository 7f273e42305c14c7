"""Kernels for the experts of many tokens: one program multiplies a tile of weights by a block of one expert's pairs.

A tile of weights is read and widened once for `PAIRS` pairs. The shape of a tile is fixed, and pairs that a block lacks
are zeros, so that the result of a pair does not depend on which other pairs are computed with it.
"""

# Triton reads the annotations of a kernel as part of it: only what is fixed when it is compiled has one.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from edgemoe.kernels.triton.grouped_kernels import activated, biased, rounded
from edgemoe.kernels.triton.language import constexpr, tl, triton


def _block(order, bounds, slots, memory, slot_step, PAIRS: constexpr):
    """The pairs of a program's block, [PAIRS], whether each is there, and the record of their expert."""
    begin, end = tl.load(bounds + 2 * tl.program_id(0)), tl.load(bounds + 2 * tl.program_id(0) + 1)
    at = begin + tl.arange(0, PAIRS)
    has = at < end
    pair = tl.load(order + at, mask=has, other=0)
    record = memory + tl.load(slots + tl.load(order + begin)).to(tl.int64) * slot_step
    return pair, has, record


block_of = triton.jit(_block)


def _is_empty(bounds):
    """Whether a program's block has no pair."""
    return tl.load(bounds + 2 * tl.program_id(0)) >= tl.load(bounds + 2 * tl.program_id(0) + 1)


is_empty = triton.jit(_is_empty)


def _product_tile(
    x,
    has,
    record,
    tables,
    rows,
    WIDTH: constexpr,
    LOAD: constexpr,
    META: constexpr,
    KIND: constexpr,
    ROWS: constexpr,
    PAIRS: constexpr,
    BLOCK: constexpr,
):
    """The products of `rows` of a matrix with the vectors at `x` [PAIRS], rounded to `KIND`: float32 [ROWS, PAIRS].

    Weights are rounded to `KIND` as well before they are multiplied. The sum is in float32.
    """
    total = tl.zeros((ROWS, PAIRS), tl.float32)
    for first in range(0, WIDTH, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = (column < WIDTH)[:, None] & has[None, :]
        value = tl.load(x[None, :] + column[:, None], mask=inside, other=0.0).to(KIND)
        weight = LOAD(record, tables, rows, first, BLOCK, META).to(KIND)
        total = tl.dot(weight, value, total, input_precision="ieee")
    return rounded(total, KIND)


product_tile = triton.jit(_product_tile)


def _up_tile(
    hidden,
    order,
    bounds,
    slots,
    memory,
    tables,
    second_tables,
    inner,
    hidden_step,
    slot_step,
    TOP_K: constexpr,
    WIDTH: constexpr,
    INNER: constexpr,
    LOAD: constexpr,
    META: constexpr,
    SECOND_LOAD: constexpr,
    SECOND_META: constexpr,
    LAYOUT: constexpr,
    BIAS: constexpr,
    ACTIVATION: constexpr,
    CONSTANTS: constexpr,
    GATE: constexpr,
    KIND: constexpr,
    SUM: constexpr,
    ROWS: constexpr,
    PAIRS: constexpr,
    BLOCK: constexpr,
):
    """As `grouped_kernels.up`; the pairs of block b are `order[bounds[b, 0]]` up to `order[bounds[b, 1] - 1]`."""
    if is_empty(bounds):
        return
    pair, has, record = block_of(order, bounds, slots, memory, slot_step, PAIRS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    x = hidden + (pair // TOP_K).to(tl.int64) * hidden_step
    inside = row < INNER
    gate = product_tile(x, has, record, tables, row * LAYOUT[0], WIDTH, LOAD, META, KIND, ROWS, PAIRS, BLOCK)
    gate = biased(gate, record, (row * LAYOUT[2])[:, None], inside[:, None], BIAS, SUM)
    up = gate
    if GATE != 0:
        up = product_tile(
            x, has, record, second_tables, row * LAYOUT[0] + LAYOUT[1],
            WIDTH, SECOND_LOAD, SECOND_META, KIND, ROWS, PAIRS, BLOCK,
        )  # fmt: skip
        up = biased(up, record, (row * LAYOUT[2] + LAYOUT[3])[:, None], inside[:, None], BIAS, SUM)
    value = activated(gate, up, ACTIVATION, CONSTANTS, GATE, SUM).to(inner.dtype.element_ty)
    tl.store(inner + pair.to(tl.int64)[None, :] * INNER + row[:, None], value, mask=inside[:, None] & has[None, :])


def _down_tile(
    inner,
    order,
    bounds,
    slots,
    memory,
    tables,
    outputs,
    slot_step,
    WIDTH: constexpr,
    HEIGHT: constexpr,
    LOAD: constexpr,
    META: constexpr,
    BIAS: constexpr,
    KIND: constexpr,
    SUM: constexpr,
    ROWS: constexpr,
    PAIRS: constexpr,
    BLOCK: constexpr,
):
    """As `grouped_kernels.down`, with the blocks of `up_tile`."""
    if is_empty(bounds):
        return
    pair, has, record = block_of(order, bounds, slots, memory, slot_step, PAIRS)
    x = inner + pair.to(tl.int64) * WIDTH
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = row < HEIGHT
    value = product_tile(x, has, record, tables, row, WIDTH, LOAD, META, KIND, ROWS, PAIRS, BLOCK)
    value = biased(value, record, row[:, None], inside[:, None], BIAS, SUM).to(outputs.dtype.element_ty)
    tl.store(outputs + pair.to(tl.int64)[None, :] * HEIGHT + row[:, None], value, mask=inside[:, None] & has[None, :])


up_tile = triton.jit(_up_tile)
down_tile = triton.jit(_down_tile)
