"""A bar on standard error while a long prompt is computed."""

from __future__ import annotations

import sys
import threading
from typing import Any

_PATIENCE = 0.7
"""Seconds that a prompt may take before it has a bar."""
_REFRESH = 0.1


class PromptProgress:
    """Shows how much of a stream's prompt is done, until `stop`. Only on a terminal, and only for a slow prompt."""

    def __init__(self, stream: Any) -> None:
        """`stream` has `prompt_tokens` and `prompt_done`; one that has not shows nothing."""
        self._stream = stream
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Show it from now on. `stop` must follow, also where this is interrupted."""
        if sys.stderr.isatty() and hasattr(self._stream, "prompt_done"):
            self._thread = threading.Thread(target=self._show, name="prompt progress", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Take the bar away. Nothing is written after this."""
        self._over.set()
        # One that an interrupt kept from being started ends before it shows anything.
        if self._thread is not None and self._thread.ident is not None:
            self._thread.join()
        self._thread = None

    def _show(self) -> None:
        if self._over.wait(_PATIENCE):
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        console = Console(stderr=True)
        parts = (TextColumn("prompt"), BarColumn(bar_width=None), MofNCompleteColumn(), TextColumn("tokens"))
        # Nothing is redirected: other threads write to the same streams, and this one changes nothing of theirs.
        with Progress(*parts, console=console, transient=True, redirect_stdout=False, redirect_stderr=False) as bar:
            task = bar.add_task("", total=self._stream.prompt_tokens)
            # An interrupt may keep `stop` from being called; a stream that is over has no prompt to wait for.
            while not (self._over.wait(_REFRESH) or self._stream.finished):
                bar.update(task, completed=self._stream.prompt_done)
