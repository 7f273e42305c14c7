"""Editing of the typed lines, their history, and completion with Tab, by the readline module."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from edgemoe.cli.chat.completion import completions

_LINES_KEPT = 1000


def history_file() -> Path | None:
    """Where the lines are kept, by the XDG convention; None for a user without a home."""
    state = os.environ.get("XDG_STATE_HOME")
    try:
        return (Path(state) if state else Path.home() / ".local" / "state") / "edgemoe" / "history"
    except RuntimeError:
        return None


@contextlib.contextmanager
def line_editing() -> Iterator[None]:
    """Give `input` editing, Tab and a history within the block, where Python has readline.

    A lost history does no harm.
    """
    try:
        import readline
    except ImportError:
        yield
        return
    path = history_file()
    if path is not None:
        with contextlib.suppress(OSError):
            readline.read_history_file(path)
    readline.set_history_length(_LINES_KEPT)
    before = readline.get_completer(), readline.get_completer_delims()
    readline.set_completer(_completer(readline))
    readline.set_completer_delims(" ")
    libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")
    if not libedit and os.environ.get("TERM") != "dumb":
        # Python turns this off; a paste then arrives as one line, with line ends in it.
        readline.parse_and_bind("set enable-bracketed-paste on")
    try:
        yield
    finally:
        readline.set_completer(before[0])
        readline.set_completer_delims(before[1])
        if path is not None:
            _keep(readline, path)


def _keep(readline: Any, path: Path) -> None:
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        readline.write_history_file(path)
        path.chmod(0o600)


def _completer(readline: Any) -> Callable[[str, int], str | None]:
    found: list[str] = []

    def complete(word: str, state: int) -> str | None:
        """The completion with the number `state`; None after the last."""
        if state == 0:
            line = readline.get_line_buffer()[: readline.get_endidx()]
            if not line.startswith("/"):
                # In a message Tab is a character, as in a text that is pasted.
                readline.insert_text("\t")
                readline.redisplay()
                return None
            found[:] = completions(line, word)
        return found[state] if state < len(found) else None

    return complete
