"""Kernels that are tried on a card before they go into the package. Importing this needs Triton.

Arithmetic over experts that lie in slots of one pool: a program finds its expert's slot in a table on the device, so
that the host need not know which experts were routed to.
"""

# Triton reads the annotations of a kernel as part of it, and knows of none but `constexpr`.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, TypeAlias

triton: Any = importlib.import_module("triton")
tl: Any = importlib.import_module("triton.language")

if TYPE_CHECKING:
    constexpr: TypeAlias = Any
else:
    constexpr = tl.constexpr


def _gather(addresses, records, sources, slots, words: constexpr, block: constexpr, programs: constexpr):
    """Copies records of `words` int64 from page-locked RAM, by their addresses, into slots of the card."""
    pair = tl.program_id(0)
    source = tl.load(addresses + tl.load(sources + pair)).to(tl.pointer_type(tl.int64))
    target = records + tl.load(slots + pair).to(tl.int64) * words
    for first in range(0, words, programs * block):
        at = first + tl.program_id(1) * block + tl.arange(0, block)
        inside = at < words
        tl.store(target + at, tl.load(source + at, mask=inside), mask=inside)


def _up_gate(
    hidden,
    pool,
    table,
    experts,
    inner,
    first,
    stride,
    offset,
    top_k: constexpr,
    width: constexpr,
    rows: constexpr,
    row_block: constexpr,
    block: constexpr,
    kind: constexpr,
):
    """silu(gate(x)) * up(x) of one expert and token a program; an expert without a slot (-1) is left out."""
    pair = tl.program_id(0)
    slot = tl.load(table + first + tl.load(experts + pair))
    if slot < 0:
        return
    base = pool + slot.to(tl.int64) * stride + offset
    row, column = tl.program_id(1) * row_block + tl.arange(0, row_block), tl.arange(0, block)
    gate, up = tl.zeros((row_block,), tl.float32), tl.zeros((row_block,), tl.float32)
    for start in range(0, width, block):
        at = start + column
        x = tl.load(hidden + (pair // top_k) * width + at).to(tl.float32)
        gate += tl.sum(tl.load(base + row[:, None] * width + at[None, :]).to(tl.float32) * x[None, :], 1)
        up += tl.sum(tl.load(base + (row + rows)[:, None] * width + at[None, :]).to(tl.float32) * x[None, :], 1)
    gate, up = gate.to(kind).to(tl.float32), up.to(kind).to(tl.float32)
    tl.store(inner + pair * rows + row, ((gate * tl.sigmoid(gate)).to(kind).to(tl.float32) * up).to(kind))


def _down(
    inner,
    pool,
    table,
    experts,
    outputs,
    first,
    stride,
    offset,
    width: constexpr,
    rows: constexpr,
    row_block: constexpr,
    block: constexpr,
    kind: constexpr,
):
    """The product that brings one expert's inner values of one token back to the model's width."""
    pair = tl.program_id(0)
    slot = tl.load(table + first + tl.load(experts + pair))
    if slot < 0:
        return
    base = pool + slot.to(tl.int64) * stride + offset
    row, column = tl.program_id(1) * row_block + tl.arange(0, row_block), tl.arange(0, block)
    total = tl.zeros((row_block,), tl.float32)
    for start in range(0, width, block):
        at = start + column
        x = tl.load(inner + pair * width + at).to(tl.float32)
        total += tl.sum(tl.load(base + row[:, None] * width + at[None, :]).to(tl.float32) * x[None, :], 1)
    tl.store(outputs + pair * rows + row, total.to(kind))


gather = triton.jit(_gather)
up_gate = triton.jit(_up_gate)
down = triton.jit(_down)
