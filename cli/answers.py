"""One answer, gathered from the stream of its chunks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from typing import TYPE_CHECKING

from edgemoe.cli.interruption import Interruption
from edgemoe.cli.surface import EngineView

if TYPE_CHECKING:
    from edgemoe import Chunk, Completion, Sampling

CANCELLED = "cancelled"
"""The finish reason of an answer that was broken off on request."""


def ask(
    engine: EngineView,
    prompt: str | Sequence[int],
    sampling: Sampling,
    interruption: Interruption,
    on_chunk: Callable[[Chunk], None],
) -> Completion:
    """Generate, handing over each chunk as it arrives. Raises what the engine and `on_chunk` raise."""
    from edgemoe import Completion

    chunks: list[Chunk] = []
    # Closed whatever happens: a generation that is left half-way keeps the engine for itself.
    with closing(engine.stream(prompt, sampling)) as stream:
        for chunk in stream:
            chunks.append(chunk)
            on_chunk(chunk)
            if interruption.requested:
                # A cancel that came before the generation began was lost on the engine.
                engine.cancel()
    last = chunks[-1]
    with_logprobs = sampling.logprobs is not None
    return Completion(
        text="".join(chunk.text for chunk in chunks),
        token_ids=tuple(token for chunk in chunks for token in chunk.token_ids),
        finish_reason=last.finish_reason or CANCELLED,
        logprobs=tuple(entry for chunk in chunks for entry in chunk.logprobs or ()) if with_logprobs else None,
        timings=last.timings,
        prompt_token_ids=() if isinstance(prompt, str) else tuple(prompt),
    )
