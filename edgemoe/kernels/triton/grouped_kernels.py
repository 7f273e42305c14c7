"""Kernels for the experts of few tokens: one program computes a block of outputs of one token and expert.

A program finds its expert's record by a slot number on the device; without one (-1) it ends at once. It reads each
weight of its rows once, and adds the products of a row in float32, in an order that depends on the shape alone: the
result of a pair does not depend on which other pairs are computed with it. Values are rounded where PyTorch's
operations round.
"""

# Triton reads the annotations of a kernel as part of it: only what is fixed when it is compiled has one.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from edgemoe.kernels.triton.language import constexpr, tl, triton


def _rounded(x, KIND: constexpr):
    """Float32 values that `KIND` has, nearest to `x`."""
    return x.to(KIND).to(tl.float32)


rounded = triton.jit(_rounded)


def _activated(gate, up, ACTIVATION: constexpr, CONSTANTS: constexpr, GATE: constexpr, KIND: constexpr):
    """What the second matrix multiplies. `gate` and `up` are float32 values of `KIND`; without a gate, `up` is unused.

    GATE is 0 without a gate, 1 where `up` times the activation of `gate` is wanted, 2 for an activation of both.
    """
    if GATE == 2:
        value = ACTIVATION(gate, up, CONSTANTS, KIND)
    elif GATE == 1:
        value = rounded(rounded(ACTIVATION(gate), KIND) * up, KIND)
    else:
        value = rounded(ACTIVATION(gate), KIND)
    return value


activated = triton.jit(_activated)


def _biased(product, record, rows, inside, BIAS: constexpr, SUM: constexpr):
    """`product` plus the bias of `rows`, of a shape that fits it.

    BIAS is its byte offset in the record, -1 without one, and its dtype.
    """
    if BIAS[0] >= 0:
        bias = tl.load((record + BIAS[0]).to(tl.pointer_type(BIAS[1])) + rows, mask=inside, other=0.0)
        product = rounded(product + bias.to(tl.float32), SUM)
    return product


biased = triton.jit(_biased)


def _product(
    x,
    record,
    tables,
    rows,
    WIDTH: constexpr,
    LOAD: constexpr,
    META: constexpr,
    KIND: constexpr,
    ROWS: constexpr,
    BLOCK: constexpr,
):
    """The products of `rows` of a matrix with the vector at `x`, rounded to `KIND`, float32 [ROWS]."""
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    # Without the number of stages a loop without `dot` waits for each of its loads.
    for first in tl.range(0, WIDTH, BLOCK, num_stages=4):
        column = first + tl.arange(0, BLOCK)
        value = tl.load(x + column, mask=column < WIDTH, other=0.0).to(KIND).to(tl.float32)
        total += LOAD(record, tables, rows, first, BLOCK, META) * value[None, :]
    return rounded(tl.sum(total, 1), KIND)


product = triton.jit(_product)


def _up(
    hidden,
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
    BLOCK: constexpr,
):
    """The first matrix, its bias and the activation.

    Row r of the gate is row r · LAYOUT[0] of its matrix, row r of up is LAYOUT[1] further; in the bias they are at
    r · LAYOUT[2] and LAYOUT[3] further.
    """
    pair = tl.program_id(0)
    slot = tl.load(slots + pair)
    if slot < 0:
        return
    record = memory + slot.to(tl.int64) * slot_step
    x = hidden + (pair // TOP_K).to(tl.int64) * hidden_step
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = row < INNER
    gate = product(x, record, tables, row * LAYOUT[0], WIDTH, LOAD, META, KIND, ROWS, BLOCK)
    gate = biased(gate, record, row * LAYOUT[2], inside, BIAS, SUM)
    up = gate
    if GATE != 0:
        rows = row * LAYOUT[0] + LAYOUT[1]
        up = product(x, record, second_tables, rows, WIDTH, SECOND_LOAD, SECOND_META, KIND, ROWS, BLOCK)
        up = biased(up, record, row * LAYOUT[2] + LAYOUT[3], inside, BIAS, SUM)
    value = activated(gate, up, ACTIVATION, CONSTANTS, GATE, SUM)
    tl.store(inner + pair.to(tl.int64) * INNER + row, value.to(inner.dtype.element_ty), mask=inside)


def _down(
    inner,
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
    BLOCK: constexpr,
):
    """The second matrix and its bias: from `inner` [pairs, WIDTH] to `outputs` [pairs, HEIGHT]."""
    pair = tl.program_id(0)
    slot = tl.load(slots + pair)
    if slot < 0:
        return
    record = memory + slot.to(tl.int64) * slot_step
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = row < HEIGHT
    x = inner + pair.to(tl.int64) * WIDTH
    value = product(x, record, tables, row, WIDTH, LOAD, META, KIND, ROWS, BLOCK)
    value = biased(value, record, row, inside, BIAS, SUM)
    tl.store(outputs + pair.to(tl.int64) * HEIGHT + row, value.to(outputs.dtype.element_ty), mask=inside)


def _linear(
    x,
    memory,
    tables,
    out,
    x_step,
    WIDTH: constexpr,
    HEIGHT: constexpr,
    LOAD: constexpr,
    META: constexpr,
    ROWS: constexpr,
    BLOCK: constexpr,
):
    """One dense matrix at `memory`: from `x` [tokens, WIDTH] to `out` [tokens, HEIGHT], added in float32."""
    token = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    at = x + token.to(tl.int64) * x_step
    value = product(at, memory, tables, row, WIDTH, LOAD, META, tl.float32, ROWS, BLOCK)
    tl.store(out + token.to(tl.int64) * HEIGHT + row, value.to(out.dtype.element_ty), mask=row < HEIGHT)


def _combine(outputs, weights, done, out, TOP_K: constexpr, WIDTH: constexpr, PRODUCT: constexpr, BLOCK: constexpr):
    """The sum of a token's outputs times their weights. A pair that is not done adds nothing, and is not read."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    total = tl.zeros((BLOCK,), tl.float32)
    for choice in range(TOP_K):
        pair = token * TOP_K + choice
        has = tl.load(done + pair) != 0
        value = tl.load(outputs + pair * WIDTH + column, mask=inside & has, other=0.0).to(tl.float32)
        weighted = rounded(value * tl.load(weights + pair).to(tl.float32), PRODUCT)
        total += tl.where(has, weighted, 0.0)
    tl.store(out + token * WIDTH + column, total.to(out.dtype.element_ty), mask=inside)


up = triton.jit(_up)
down = triton.jit(_down)
linear = triton.jit(_linear)
combine = triton.jit(_combine)
