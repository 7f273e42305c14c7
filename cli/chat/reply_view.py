"""A reply as it is shown: its text, and on a terminal its reasoning, with nothing in it that a terminal would obey."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from edgemoe.cli.render import harmless

if TYPE_CHECKING:
    from edgemoe import Chunk

DIM, NORMAL = "\x1b[2m", "\x1b[0m"


class ReplyView:
    """Writes the chunks of one reply. Where it does not go to a terminal, its text is written as it is."""

    def __init__(self, write: Callable[[str], None], *, terminal: bool) -> None:
        """`terminal`: what `write` writes is shown on a terminal."""
        self._write = write
        self._terminal = terminal
        self._begin, self._end = _reasoning_marks()
        self._reasoning = False
        """Whether reasoning is being shown."""

    def add(self, chunk: Chunk) -> None:
        """Show a chunk."""
        shown = ""
        if chunk.reasoning and self._terminal:
            shown += "" if self._reasoning else self._begin
            self._reasoning = True
            shown += harmless(chunk.reasoning)
        if chunk.text or chunk.finish_reason:
            if self._reasoning:
                shown += self._end + ("\n\n" if chunk.text else "")
            self._reasoning = False
            shown += harmless(chunk.text) if self._terminal else chunk.text
        if shown:
            self._write(shown)

    def close(self) -> None:
        """Leave the terminal as it was, also where the reply broke off in its reasoning."""
        if self._reasoning:
            self._write(self._end)
        self._reasoning = False


def _reasoning_marks() -> tuple[str, str]:
    """What stands before and after reasoning: dim letters, or words where escape sequences are not wanted."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return "[reasoning] ", " [end of reasoning]"
    return DIM, NORMAL
