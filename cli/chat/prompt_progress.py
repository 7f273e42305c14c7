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
        if sys.stderr.isatty() and hasattr(stream, "prompt_done"):
            self._thread = threading.Thread(target=self._show, name="prompt progress", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Take the bar away. Nothing is written after this."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _show(self) -> None:
        if self._over.wait(_PATIENCE):
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        parts = (TextColumn("prompt"), BarColumn(bar_width=None), MofNCompleteColumn(), TextColumn("tokens"))
        with Progress(*parts, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("", total=self._stream.prompt_tokens)
            while not self._over.wait(_REFRESH):
                bar.update(task, completed=self._stream.prompt_done)
