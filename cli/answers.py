"""One answer, gathered from the stream of its chunks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING

from edgemoe.cli.interruption import Interruption
from edgemoe.cli.surface import EngineView

if TYPE_CHECKING:
    from edgemoe import Chunk, Completion, Sampling
    from edgemoe.checkpoint.chat_template import ChatPrompt

CANCELLED = "cancelled"
"""The finish reason of an answer that was broken off on request."""


def ask(
    engine: EngineView,
    chat: ChatPrompt,
    sampling: Sampling,
    interruption: Interruption,
    on_chunk: Callable[[Chunk], None],
) -> Completion:
    """Reply to a conversation, handing over each chunk as it arrives. Raises what the engine and `on_chunk` raise."""
    from edgemoe import Completion

    chunks: list[Chunk] = []
    # Closed whatever happens: a generation that is left half-way keeps its place on the engine.
    with closing(engine.stream(chat, sampling)) as stream:
        for chunk in stream:
            chunks.append(chunk)
            on_chunk(chunk)
            if interruption.requested:
                # A cancel that came before the generation began was lost on the engine.
                engine.cancel()
    return Completion.from_chunks(chunks, ())
