"""A kernel that is tried on a card before it goes into the package. Importing this needs Triton."""

# Triton reads the annotations of a kernel as part of it, and knows of none but `constexpr`.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from edgemoe.kernels.triton.language import constexpr, tl, triton


def _gather(addresses, records, sources, slots, words: constexpr, block: constexpr, programs: constexpr):
    """Copies records of `words` int64 from page-locked RAM, by their addresses, into slots of the card."""
    pair = tl.program_id(0)
    source = tl.load(addresses + tl.load(sources + pair)).to(tl.pointer_type(tl.int64))
    target = records + tl.load(slots + pair).to(tl.int64) * words
    for first in range(0, words, programs * block):
        at = first + tl.program_id(1) * block + tl.arange(0, block)
        inside = at < words
        tl.store(target + at, tl.load(source + at, mask=inside), mask=inside)


gather = triton.jit(_gather)
