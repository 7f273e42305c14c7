"""What a person types or pastes, taken apart into messages."""

from __future__ import annotations

import select
import sys
from collections.abc import Callable
from typing import NamedTuple

PROMPT = ">>> "
MORE = "... "
_QUOTES = '"""'
_PASTE_GAP = 0.03
"""Seconds within which a pasted line follows another; nobody types one in that time."""


class Message(NamedTuple):
    """A message or a command."""

    text: str
    quoted: bool
    """Whether it is a message, whatever it begins with."""


class MessageInput:
    """Reads messages by lines.

    Lines that are pasted together are one message. A terminal marks what is pasted, so that it arrives as one line
    with line ends in it; where it does not, the lines of a paste follow one another at once. Lines that wait already
    when the prompt is shown were typed during a reply: those are a message each.
    """

    def __init__(self, read_line: Callable[[str], str], pending: Callable[[float], bool]) -> None:
        """`read_line` shows a prompt and returns a line; `pending` waits so many seconds for more input."""
        self._read_line = read_line
        self._pending = pending
        self._commands: list[str] = []
        """Commands of a paste that are still to be carried out."""

    def read(self) -> Message:
        """The next message. Raises what reading a line raises."""
        if self._commands:
            return Message(self._commands.pop(0), False)
        typed_ahead = self._pending(0.0)
        text = self._read_line(PROMPT)
        while not typed_ahead and self._pending(_PASTE_GAP):
            text += "\n" + self._more()
        if text.lstrip().startswith(_QUOTES):
            return Message(self._quoted(text.lstrip()[len(_QUOTES) :]), True)
        return self._parted(text)

    def _quoted(self, text: str) -> str:
        while not text.rstrip().endswith(_QUOTES):
            text += "\n" + self._read_line(MORE)
        return text.rstrip()[: -len(_QUOTES)].strip("\n")

    def _more(self) -> str:
        """Another line of a paste; the end of the input ends only the paste."""
        try:
            return self._read_line(MORE)
        except EOFError:
            return ""

    def _parted(self, text: str) -> Message:
        lines = [line for line in text.splitlines() if line.strip()]
        if len(lines) <= 1:
            return Message(text.strip(), False)
        if all(line.startswith("/") for line in lines):
            first, *self._commands = [line.strip() for line in lines]
            return Message(first, False)
        return Message(text.strip("\r\n"), True)


def input_pending(seconds: float) -> bool:
    """Whether standard input has something to read within so many seconds."""
    try:
        return bool(select.select([sys.stdin], [], [], seconds)[0])
    except (OSError, ValueError):
        # No select on this kind of input (Windows): then every line is a message.
        return False
