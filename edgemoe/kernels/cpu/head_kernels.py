"""What happens to queries, keys and values between their projections and attention, by one call for all heads.

Rounding, the norm of a head, the rotary position embedding, and the copy into the KV cache: in PyTorch some thirty
operations. Every value has the bits that these give.
"""

from __future__ import annotations

import numpy as np
from numba import carray, types  # type: ignore[attr-defined]

from edgemoe.cache.compiled import Native, compiled
from edgemoe.kernels.cpu.row_kernels import in_order, nearest_bf16, norm_bf16, norm_f32, rounded_to_bf16, widened
from edgemoe.kernels.cpu.vector_ir import pointer_to

COUNT = 24
(
    PLACES, QUERIES, KEYS, WIDTH, DEPTH, OUT, OUT_HEAD, ROTATED, COSINES, SINES, ROUNDS,
    Q, Q_STEP, Q_BIAS, Q_NORM, Q_EPSILON, K, K_STEP, K_BIAS, K_NORM, K_EPSILON, V, V_STEP, V_BIAS,
) = range(COUNT)  # fmt: skip
"""Words of a job: the address of `PLACE` words for each token; heads of the queries, and of the keys, of which there
are as many as of the values; values of a key, and of a value; the address of the queries, [tokens, heads, values], and
bytes from one head to the next; how many values are rotated, from the first one on, and the addresses of so many
cosines and sines for each token; whether a norm's quotient is rounded. Then of each projection: the address of float32
rows, bytes from one token to the next, and the address of its bias, or 0; of the norm's weights, or 0, and the bits of
its epsilon, float32 all."""
PLACE = 4
"""Where a token's keys go: the address of the first head's row, and bytes to the next one's; and its values."""

_words, _bf16, _f32 = pointer_to(types.int64), pointer_to(types.uint16), pointer_to(types.float32)


@Native
def heads_bf16(job, scratch, first, last):  # type: ignore[no-untyped-def]
    """The items first ≤ i < last: item `token * heads + head`; heads are those of queries, then keys, then values.

    `scratch` is the address of two rows of the widest head.
    """
    of = carray(_words(job), COUNT)
    for item in range(first, last):
        token, columns, rotated, source, bias, norm, epsilon, out = _places(of, item)
        row, other = carray(_bf16(scratch), columns), carray(_bf16(scratch + 2 * columns), columns)
        _load_bf16(carray(_f32(source), columns), bias, row)
        if norm != 0:
            norm_bf16(row, carray(_f32(norm), columns), np.uint32(epsilon).view(np.float32), of[ROUNDS] != 0, other)
            row = other
        at = 2 * token * of[ROTATED]
        cosines, sines = carray(_bf16(of[COSINES] + at), rotated), carray(_bf16(of[SINES] + at), rotated)
        _rotate_bf16(row, cosines, sines, carray(_bf16(out), columns))


@Native
def heads_f32(job, scratch, first, last):  # type: ignore[no-untyped-def]
    """As `heads_bf16` for float32."""
    of = carray(_words(job), COUNT)
    for item in range(first, last):
        token, columns, rotated, source, bias, norm, epsilon, out = _places(of, item)
        row, other = carray(_f32(scratch), columns), carray(_f32(scratch + 4 * columns), columns)
        _load_f32(carray(_f32(source), columns), bias, row)
        if norm != 0:
            norm_f32(row, carray(_f32(norm), columns), np.uint32(epsilon).view(np.float32), other)
            row = other
        at = 4 * token * of[ROTATED]
        cosines, sines = carray(_f32(of[COSINES] + at), rotated), carray(_f32(of[SINES] + at), rotated)
        _rotate_f32(row, cosines, sines, carray(_f32(out), columns))


@compiled(**in_order)
def _places(of, item):  # type: ignore[no-untyped-def]
    """Of an item: its token, how many values it has and how many of them are rotated, the addresses of its row and
    bias, of its norm's weights, the norm's epsilon, and where it goes."""
    width, depth, rotated = of[WIDTH], of[DEPTH], of[ROTATED]
    heads = of[QUERIES] + 2 * of[KEYS]
    token, head = item // heads, item % heads
    places = carray(_words(of[PLACES] + 8 * PLACE * token), PLACE)
    if head < of[QUERIES]:
        at, out = 4 * head * width, of[OUT] + (token * of[QUERIES] + head) * of[OUT_HEAD]
        source, bias = of[Q] + token * of[Q_STEP] + at, _moved(of[Q_BIAS], at)
        return token, width, rotated, source, bias, of[Q_NORM], of[Q_EPSILON], out
    own = head - of[QUERIES]
    if own < of[KEYS]:
        at, out = 4 * own * width, places[0] + own * places[1]
        source, bias = of[K] + token * of[K_STEP] + at, _moved(of[K_BIAS], at)
        return token, width, rotated, source, bias, of[K_NORM], of[K_EPSILON], out
    own -= of[KEYS]
    at, out = 4 * own * depth, places[2] + own * places[3]
    return token, depth, 0, of[V] + token * of[V_STEP] + at, _moved(of[V_BIAS], at), 0, 0, out


@compiled(**in_order)
def _moved(address, nbytes):  # type: ignore[no-untyped-def]
    return address + nbytes if address != 0 else 0


@compiled(**in_order)
def _load_bf16(values, bias, row):  # type: ignore[no-untyped-def]
    if bias != 0:
        added = carray(_f32(bias), len(row))
        for c in range(len(row)):
            row[c] = np.uint16(rounded_to_bf16(values[c] + added[c]))
    else:
        for c in range(len(row)):
            row[c] = np.uint16(rounded_to_bf16(values[c]))


@compiled(**in_order)
def _load_f32(values, bias, row):  # type: ignore[no-untyped-def]
    if bias != 0:
        added = carray(_f32(bias), len(row))
        for c in range(len(row)):
            row[c] = values[c] + added[c]
    else:
        for c in range(len(row)):
            row[c] = values[c]


@compiled(**in_order)
def _rotate_bf16(row, cosines, sines, out):  # type: ignore[no-untyped-def]
    """out = row * cosines + (-second half, first half) * sines, each operation rounded; the rest is copied."""
    rotated = len(cosines)
    half = rotated // 2
    for c in range(half):
        low, high = widened(row[c]), widened(row[c + half])
        first, second = nearest_bf16(low * widened(cosines[c])), nearest_bf16(-high * widened(sines[c]))
        third = nearest_bf16(high * widened(cosines[c + half]))
        out[c] = np.uint16(rounded_to_bf16(first + second))
        out[c + half] = np.uint16(rounded_to_bf16(third + nearest_bf16(low * widened(sines[c + half]))))
    for c in range(rotated, len(row)):
        out[c] = row[c]


@compiled(**in_order)
def _rotate_f32(row, cosines, sines, out):  # type: ignore[no-untyped-def]
    """As `_rotate_bf16` for float32."""
    rotated = len(cosines)
    half = rotated // 2
    for c in range(half):
        low, high = row[c], row[c + half]
        out[c] = low * cosines[c] + -high * sines[c]
        out[c + half] = high * cosines[c + half] + low * sines[c + half]
    for c in range(rotated, len(row)):
        out[c] = row[c]
