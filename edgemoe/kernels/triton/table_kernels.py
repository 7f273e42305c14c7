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


def _write(table, change):
    """Sets the entry of a `change`, as `packed_change` makes it."""
    value = ((change & 0xFFFFFFFF) - 1).to(tl.int32)
    tl.store(table + ((change >> 32) & 0x3FFFFFFF), value)


write = triton.jit(_write)


def _patch(table, c0, c1, c2, c3, c4, c5, c6, c7, c8, c9, c10, c11, c12, c13, c14, c15):
    """Makes 16 changes of a table. Those of one place are equal."""
    write(table, c0)
    write(table, c1)
    write(table, c2)
    write(table, c3)
    write(table, c4)
    write(table, c5)
    write(table, c6)
    write(table, c7)
    write(table, c8)
    write(table, c9)
    write(table, c10)
    write(table, c11)
    write(table, c12)
    write(table, c13)
    write(table, c14)
    write(table, c15)


CHANGES = 16
"""Entries that one launch of `patch` sets."""


def packed_change(place: int, value: int) -> int:
    """A place from 0 to 2^30 - 1 and the value that it gets, -1 or more, as one number, which is one of 64 bits always.

    Triton compiles a kernel for each combination of the widths of its numbers.
    """
    return 1 << 62 | place << 32 | value + 1


# A new number of pairs, another layer's row of the table and other values compile nothing anew.
resolve = triton.jit(
    _resolve,
    do_not_specialize=["pairs", "experts"],
    do_not_specialize_on_alignment=["table", "live", "slots", "done", "chosen"],
)
patch = triton.jit(_patch, do_not_specialize=[f"c{at}" for at in range(CHANGES)])
