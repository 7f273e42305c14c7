"""What each running request computes in a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from edgemoe.generation import Generation

CanChunk = Callable[[Sequence[int]], bool]
"""Whether a prompt may be run in parts."""


class Share(NamedTuple):
    """What one request computes in a step."""

    generation: Generation
    tokens: int
    """How many, the next ones that its past does not have."""


def select(running: Sequence[Generation], step_tokens: int, can_chunk: CanChunk) -> list[Share]:
    """Who computes how many of `step_tokens`: one each for those that decode, shares of what is left for prompts."""
    decoding = [generation for generation in running if generation.missing == 1]
    prompts = [generation for generation in running if generation.missing > 1]
    shares = [Share(generation, 1) for generation in decoding]
    # However many decode, newcomers get on.
    budget = max(step_tokens - len(decoding), step_tokens // 4, 1)
    left = budget
    for place, generation in enumerate(prompts):
        count = _chunk(generation, max(1, left // (len(prompts) - place)), can_chunk, first=left == budget)
        if count:
            shares.append(Share(generation, count))
            left = max(0, left - count)
    return shares


def _chunk(generation: Generation, share: int, can_chunk: CanChunk, *, first: bool) -> int:
    """Tokens of a prompt for this step. What cannot be run in parts goes whole, one in a step, or waits."""
    assert generation.past is not None
    wanted = generation.missing
    if generation.pause_at is not None and generation.past.tokens < generation.pause_at:
        wanted = min(wanted, generation.pause_at - generation.past.tokens)
    if wanted <= share:
        return wanted
    if can_chunk(generation.tokens):
        return share
    return wanted if first else 0
