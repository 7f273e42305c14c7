"""Attention of single tokens on CPUs. Each token's output is one sum in one order, whatever is computed with it.

A token's query heads that share a key head are computed together: a key, or a value, is read from memory and widened
once for all of them. Sums are float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from edgemoe.cache.compiled import compiled
from edgemoe.kernels.cpu.row_kernels import exponential, rounded_to_bf16

_options: dict[str, Any] = {"nogil": True, "boundscheck": False, "error_model": "numpy"}
_in_any_order: dict[str, Any] = _options | {"fastmath": {"reassoc", "contract", "nsz"}}
_in_order: dict[str, Any] = _options | {"fastmath": {"contract", "nsz"}}

SHAPE = (
    "heads", "group", "tokens", "width", "depth",
    "q_head", "q_token", "k_head", "k_token", "v_head", "v_token", "out_head", "out_token",
)  # fmt: skip
"""What `shape` holds: key heads, query heads that share one, tokens, the values of a key and of a value, and by how
many values heads and tokens lie apart in each of the memories."""


@compiled(**_options)
def attend(q, k, v, shape, spans, places, starts, scale, out, first, last):  # type: ignore[no-untyped-def]
    """Attention of the items first ≤ i < last, each a key head and a token: item `head * tokens + token`.

    `q`, `k`, `v` and `out` are one-dimensional memories, of float32 or of bf16 as uint16, and `shape` is int64, see
    `SHAPE`. Token t attends to the keys `spans[t, 0]` ≤ j < `spans[t, 1]`, then to those from `places[starts[t]]` up to
    `places[starts[t + 1]]`; all are int64. Products of queries and keys are multiplied by `scale`, a float32.
    """
    group, tokens, width, depth = shape[1], shape[2], shape[3], shape[4]
    most = 0
    for t in range(tokens):
        most = max(most, spans[t, 1] - spans[t, 0] + starts[t + 1] - starts[t])
    shares = np.empty((group, most), np.float32)
    queries = np.empty((group, width), np.float32)
    sums = np.empty((group, depth), np.float32)
    row = np.empty(max(width, depth), np.float32)
    for item in range(first, last):
        head, t = item // tokens, item % tokens
        begin, near = spans[t, 0], spans[t, 1] - spans[t, 0]
        others = places[starts[t] : starts[t + 1]]
        count = near + len(others)
        for g in range(group):
            _read(q, (head * group + g) * shape[5] + t * shape[6], queries[g])
            sums[g, :] = np.float32(0)
        for j in range(count):
            place = begin + j if j < near else others[j - near]
            _read(k, head * shape[7] + place * shape[8], row[:width])
            for g in range(group):
                shares[g, j] = _dot(queries[g], row) * scale
        for g in range(group):
            _softmax(shares[g, :count])
        for j in range(count):
            place = begin + j if j < near else others[j - near]
            _read(v, head * shape[9] + place * shape[10], row[:depth])
            for g in range(group):
                _add_times(sums[g], row, shares[g, j])
        for g in range(group):
            _write(sums[g], out, (head * group + g) * shape[11] + t * shape[12])


@compiled(**_in_any_order)
def _dot(x, y):  # type: ignore[no-untyped-def]
    """The sum of the products, one of `x` each."""
    total = np.float32(0)
    for d in range(len(x)):
        total += x[d] * y[d]
    return total


@compiled(**_in_any_order)
def _softmax(values):  # type: ignore[no-untyped-def]
    """Replaces `values` by their exponentials, divided by the sum of all."""
    largest = values[0]
    for j in range(len(values)):
        largest = max(largest, values[j])
    total = np.float32(0)
    for j in range(len(values)):
        values[j] = exponential(values[j] - largest)
        total += values[j]
    scale = np.float32(1) / total
    for j in range(len(values)):
        values[j] *= scale


@compiled(**_in_order)
def _add_times(sums, row, share):  # type: ignore[no-untyped-def]
    """Adds `row`, times `share`, to `sums`."""
    for d in range(len(sums)):
        sums[d] += share * row[d]


def _read(memory: Any, at: Any, out: Any) -> None:
    """Copies the values of `memory` from `at` on to all of `out`, as float32."""
    raise NotImplementedError


@overload(_read, inline="always")
def _read_typed(memory, at, out):  # type: ignore[no-untyped-def]
    if memory.dtype is types.float32:

        def read(memory, at, out):  # type: ignore[no-untyped-def]
            for d in range(len(out)):
                out[d] = memory[at + d]

    else:

        def read(memory, at, out):  # type: ignore[no-untyped-def]
            for d in range(len(out)):
                out[d] = np.uint32(np.uint32(memory[at + d]) << np.uint32(16)).view(np.float32)

    return read


def _write(values: Any, memory: Any, at: Any) -> None:
    """Copies `values`, float32, to `memory` from `at` on, rounded to its type."""
    raise NotImplementedError


@overload(_write, inline="always")
def _write_typed(values, memory, at):  # type: ignore[no-untyped-def]
    if memory.dtype is types.float32:

        def write(values, memory, at):  # type: ignore[no-untyped-def]
            for d in range(len(values)):
                memory[at + d] = values[d]

    else:

        def write(values, memory, at):  # type: ignore[no-untyped-def]
            for d in range(len(values)):
                memory[at + d] = np.uint16(rounded_to_bf16(values[d]))

    return write
