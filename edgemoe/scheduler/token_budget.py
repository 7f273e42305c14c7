"""How many tokens each running request gets in a step: decoding first, then parts of prompts (chunked prefill)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgemoe.request.request import Request
from edgemoe.scheduler.step import ScheduledTokens


def select(
    running: Sequence[Request], step_tokens: int, can_chunk: bool, pauses: Mapping[Request, int]
) -> list[ScheduledTokens]:
    """Divides `step_tokens`: one for each request that decodes, the rest equally among prompts.

    Prompts get a quarter of the step however many requests decode. `pauses` are the numbers of cached tokens at which
    a prompt's next part ends, so that its KV cache can be copied there. Where `can_chunk` is False a prompt runs
    whole, one in a step.
    """
    decoding = [request for request in running if request.uncomputed == 1]
    prompts = [request for request in running if request.uncomputed > 1]
    scheduled = [ScheduledTokens(request, 1) for request in decoding]
    budget = max(step_tokens - len(decoding), step_tokens // 4, 1)
    left = budget
    for place, request in enumerate(prompts):
        part = max(1, left // (len(prompts) - place))
        count = _prompt_tokens(request, part, can_chunk, pauses.get(request), first=left == budget)
        if count:
            scheduled.append(ScheduledTokens(request, count))
            left = max(0, left - count)
    return scheduled


def _prompt_tokens(request: Request, part: int, can_chunk: bool, pause: int | None, *, first: bool) -> int:
    """How many tokens of a prompt run in this step; 0 where the prompt cannot be divided and another one is whole."""
    assert request.cache is not None
    wanted = request.uncomputed
    if pause is not None and request.cache.tokens < pause:
        wanted = min(wanted, pause - request.cache.tokens)
    if wanted <= part:
        return wanted
    if can_chunk:
        return part
    return wanted if first else 0
