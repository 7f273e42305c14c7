"""What each running request computes in a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from edgemoe.request.request import Request

CanChunk = Callable[[Sequence[int]], bool]
"""Whether a prompt may be run in parts."""


class ScheduledTokens(NamedTuple):
    """What one request computes in a step."""

    request: Request
    tokens: int
    """How many, the next ones that its past does not have."""


def select(running: Sequence[Request], step_tokens: int, can_chunk: CanChunk) -> list[ScheduledTokens]:
    """Who computes how many of `step_tokens`: one each for those that decode, shares of what is left for prompts."""
    decoding = [request for request in running if request.missing == 1]
    prompts = [request for request in running if request.missing > 1]
    scheduled = [ScheduledTokens(request, 1) for request in decoding]
    # However many decode, newcomers get on.
    budget = max(step_tokens - len(decoding), step_tokens // 4, 1)
    left = budget
    for place, request in enumerate(prompts):
        count = _chunk(request, max(1, left // (len(prompts) - place)), can_chunk, first=left == budget)
        if count:
            scheduled.append(ScheduledTokens(request, count))
            left = max(0, left - count)
    return scheduled


def _chunk(request: Request, each_share: int, can_chunk: CanChunk, *, first: bool) -> int:
    """Tokens of a prompt for this step. What cannot be run in parts goes whole, one in a step, or waits."""
    assert request.cache is not None
    wanted = request.missing
    if request.pause_at is not None and request.cache.tokens < request.pause_at:
        wanted = min(wanted, request.pause_at - request.cache.tokens)
    if wanted <= each_share:
        return wanted
    if can_chunk(request.tokens):
        return each_share
    return wanted if first else 0
