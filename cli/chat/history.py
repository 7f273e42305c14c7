"""The lines typed into the chat, kept from one to the next by the readline module."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

_LINES_KEPT = 1000


def history_file() -> Path:
    """Where the lines are kept, by the XDG convention."""
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "edgemoe" / "history"


@contextlib.contextmanager
def line_editing() -> Iterator[None]:
    """Give `input` editing and a history within the block, where Python has readline. A lost history does no harm."""
    try:
        import readline
    except ImportError:
        yield
        return
    path = history_file()
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(_LINES_KEPT)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            readline.write_history_file(path)
            path.chmod(0o600)
