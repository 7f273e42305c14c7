"""One answer, gathered from the stream of its chunks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING, NamedTuple

from edgemoe.cli.chat.prompt_progress import PromptProgress
from edgemoe.cli.interruption import Interruption
from edgemoe.cli.surface import EngineView

if TYPE_CHECKING:
    from edgemoe import Chunk, Completion, Sampling
    from edgemoe.checkpoint.chat_template import ChatPrompt


class Answer(NamedTuple):
    """A reply, and whether Ctrl-C ended it."""

    completion: Completion
    interrupted: bool


def ask(engine: EngineView, chat: ChatPrompt, sampling: Sampling, on_chunk: Callable[[Chunk], None]) -> Answer:
    """Reply to a conversation, handing over each chunk as it arrives. Raises what the engine and `on_chunk` raise.

    The first Ctrl-C ends the reply, and what there is of it is the answer; the second one raises KeyboardInterrupt.
    """
    from edgemoe import Completion

    chunks: list[Chunk] = []
    # Closed whatever happens: a generation that is left half-way keeps its place on the engine.
    with closing(engine.stream(chat, sampling)) as stream:
        # A stream of its own can be cancelled alone.
        cancel: Callable[[], None] = getattr(stream, "cancel", engine.cancel)
        progress = PromptProgress(stream)
        try:
            with Interruption(cancel) as interruption:
                progress.start()
                for chunk in stream:
                    progress.stop()
                    chunks.append(chunk)
                    on_chunk(chunk)
                    if interruption.requested:
                        # A cancel that came before the generation began was lost on the engine.
                        cancel()
        finally:
            progress.stop()
    return Answer(Completion.from_chunks(chunks, ()), interruption.requested)
