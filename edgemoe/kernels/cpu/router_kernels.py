"""A router's choice on CPUs, from its products to routing weights: one call for what takes PyTorch six operations.

Sums are float32, in one order. Of experts with the same score the one of the lower number is chosen.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import carray  # type: ignore[attr-defined]

from edgemoe.cache.compiled import Native, compiled
from edgemoe.kernels.cpu.row_kernels import (
    as_bf16,
    as_f32,
    as_words,
    exponential,
    in_order,
    nearest_bf16,
    round_all,
)


class Words(NamedTuple):
    """What the kernel reads at the address of its job, a word of 64 bits each."""

    products: int
    """The address of those of the first token with the router's rows, float32."""
    step: int
    """Bytes from one token's to the next."""
    experts: int
    top_k: int
    rounds: int
    """Whether products are rounded to bf16 first."""
    normalises: int
    """Whether the weights of a token's experts are divided by their sum."""
    weights: int
    """The address of the chosen experts' weights, [tokens, top-k]."""
    halves: int
    """Whether these are bf16, otherwise float32."""
    chosen: int
    """The address of the chosen experts, int64 [tokens, top-k], the heaviest first."""
    slots: int = 0
    """The address of the slots of all experts, int64 [experts], or 0."""
    found: int = 0
    """The address of those of the chosen ones, int64 [tokens, top-k]."""


COUNT = len(Words._fields)
PRODUCTS, STEP, EXPERTS, TOP_K, ROUNDS, NORMALISES, WEIGHTS, HALVES, CHOSEN, SLOTS, FOUND = range(COUNT)
"""The places of `Words`, for compiled code."""


def scratch_nbytes(experts: int, top_k: int) -> int:
    """Bytes that the kernel works in."""
    return 4 * (experts + top_k)


@Native
def softmax_top_k(job, scratch, first, last):  # type: ignore[no-untyped-def]
    """The experts of the largest probabilities, and these, for the tokens first ≤ r < last."""
    of = carray(as_words(job), COUNT)
    experts, top_k = of[EXPERTS], of[TOP_K]
    scores, values = carray(as_f32(scratch), experts), carray(as_f32(scratch + 4 * experts), top_k)
    for r in range(first, last):
        chosen = carray(as_words(of[CHOSEN] + 8 * r * top_k), top_k)
        _softmax(carray(as_f32(of[PRODUCTS] + r * of[STEP]), experts), of[ROUNDS] != 0, scores)
        _take_largest(scores, chosen, values)
        if of[NORMALISES] != 0:
            _normalise(values)
        if of[HALVES] != 0:
            round_all(values, carray(as_bf16(of[WEIGHTS] + 2 * r * top_k), top_k))
        else:
            carray(as_f32(of[WEIGHTS] + 4 * r * top_k), top_k)[:] = values
        if of[SLOTS] != 0:
            _look_up(carray(as_words(of[SLOTS]), experts), chosen, carray(as_words(of[FOUND] + 8 * r * top_k), top_k))


@compiled(**in_order)
def _softmax(products, rounds, out):  # type: ignore[no-untyped-def]
    largest = np.float32(-np.inf)
    for c in range(len(out)):
        out[c] = nearest_bf16(products[c]) if rounds else products[c]
        largest = max(largest, out[c])
    total = np.float32(0)
    for c in range(len(out)):
        out[c] = exponential(out[c] - largest)
        total += out[c]
    for c in range(len(out)):
        out[c] = out[c] / total


@compiled(**in_order)
def _take_largest(scores, chosen, values):  # type: ignore[no-untyped-def]
    """Distinct experts, also where scores are no numbers. Those taken are marked by -1."""
    for k in range(len(chosen)):
        best = -1
        for c in range(len(scores)):
            if scores[c] != np.float32(-1) and (best < 0 or scores[c] > scores[best]):
                best = c
        chosen[k], values[k] = best, scores[best]
        scores[best] = np.float32(-1)


@compiled(**in_order)
def _normalise(values):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for k in range(len(values)):
        total += values[k]
    for k in range(len(values)):
        values[k] = values[k] / total


@compiled(**in_order)
def _look_up(slots, chosen, found):  # type: ignore[no-untyped-def]
    for k in range(len(chosen)):
        found[k] = slots[chosen[k]]
