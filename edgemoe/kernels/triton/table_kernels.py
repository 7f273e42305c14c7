"""Kernels that read and change the table on the device which says where each expert's record lies."""

# Triton reads the annotations of a kernel as part of it: only what is fixed when it is compiled has one.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from edgemoe.kernels.triton.language import constexpr, tl, triton


def _resolve(
    ids,
    weights,
    table,
    live,
    slots,
    done,
    chosen,
    pairs,
    experts,
    TOP_K: constexpr,
    FIRST: constexpr,
    HAS_LIVE: constexpr,
    BLOCK: constexpr,
):
    """The slot of each pair that is to be computed now, -1 for the others; `done` is set where there is one.

    The first time, `chosen` gets the expert of each pair, -1 where none is to be computed.

    `table` holds the slots of one layer's experts, -1 for an absent one. Tokens from `live[0]` on are left out.
    """
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pair < pairs
    expert = tl.load(ids + pair, mask=inside, other=-1)
    weight = tl.load(weights + pair, mask=inside, other=0.0).to(tl.float32)
    wanted = inside & (expert >= 0) & (expert < experts) & (weight != 0.0)
    if HAS_LIVE:
        wanted = wanted & (pair // TOP_K < tl.load(live))
    if FIRST:
        tl.store(chosen + pair, tl.where(wanted, expert, -1).to(tl.int32), mask=inside)
    else:
        wanted = wanted & (tl.load(done + pair, mask=inside, other=1) == 0)
    slot = tl.load(table + expert, mask=wanted, other=-1)
    found = slot >= 0
    tl.store(slots + pair, slot, mask=inside)
    if FIRST:
        tl.store(done + pair, found.to(tl.int32), mask=inside)
    else:
        tl.store(done + pair, 1, mask=found)


def _patch(table, p0, p1, p2, p3, p4, p5, p6, p7, v0, v1, v2, v3, v4, v5, v6, v7):
    """Sets the entries at the places `p0` to `p7` to the values `v0` to `v7`. Equal places have equal values."""
    tl.store(table + p0, v0)
    tl.store(table + p1, v1)
    tl.store(table + p2, v2)
    tl.store(table + p3, v3)
    tl.store(table + p4, v4)
    tl.store(table + p5, v5)
    tl.store(table + p6, v6)
    tl.store(table + p7, v7)


CHANGES = 8
"""Entries that one launch of `patch` sets."""

# A new number of pairs, another layer's row of the table and other values compile nothing anew.
resolve = triton.jit(
    _resolve,
    do_not_specialize=["pairs", "experts"],
    do_not_specialize_on_alignment=["table", "live", "slots", "done", "chosen"],
)
patch = triton.jit(_patch, do_not_specialize=[f"{kind}{at}" for kind in "pv" for at in range(CHANGES)])
