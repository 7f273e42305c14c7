"""Lines on a standard error that is no terminal: what nobody watches live is read in a file."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

from edgemoe.cli.output import say

FIRST_NOTE, NEXT_NOTES = 10.0, 30.0
"""Seconds until the first line, and from each one to the next."""


class TimedNotes:
    """Says how far a job is, every now and then."""

    def __init__(self) -> None:
        self._due = time.monotonic() + FIRST_NOTE

    def offer(self, text: Callable[[], str]) -> None:
        """Says `text`, where the last line is long enough ago."""
        now = time.monotonic()
        if now >= self._due:
            self._due = now + NEXT_NOTES
            # A log that cannot be written ends no job.
            with suppress(OSError, ValueError):
                say(text())
