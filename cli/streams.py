"""The standard streams of a process that may have been started without some of them, or lose them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedWriter, FileIO, TextIOWrapper
from typing import Any


class NoStream(TextIOWrapper):
    """In the place of a stream that was closed before the process started: what is written is lost."""

    def __init__(self) -> None:
        super().__init__(BufferedWriter(FileIO(os.devnull, "w")), encoding="utf-8", errors="replace")


class Notes:
    """Standard error: nothing depends on whether anybody reads it, so that what cannot be written is lost."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes `text`, if that is possible."""
        try:
            return int(self._stream.write(text))
        except (OSError, ValueError):
            return len(text)

    def flush(self) -> None:
        """Flushes, if that is possible."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            return

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def standard_streams() -> Iterator[None]:
    """In the block standard output and standard error are there, and writing to standard error never fails."""
    before = sys.stdout, sys.stderr
    _occupy_descriptors()
    if sys.stdout is None:
        sys.stdout = NoStream()
    sys.stderr = Notes(NoStream() if sys.stderr is None else sys.stderr)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def _occupy_descriptors() -> None:
    """Puts the null device in the place of closed standard descriptors, which the next opened file would get."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
