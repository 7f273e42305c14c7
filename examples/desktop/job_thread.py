"""A thread that does one job after the other, so that the window's thread only ever hands them over."""

from __future__ import annotations

import queue
import threading
import traceback
from collections.abc import Callable

from PySide6.QtCore import QThread, Signal

import edgemoe
from edgemoe import EdgeMoEError

_IMPORTING = threading.Lock()


def preload() -> None:
    """Imports what edgemoe imports on first use, PyTorch above all: some seconds, here while the window appears.

    One thread at a time, since modules that import one another must not be imported by two at once.
    """
    with _IMPORTING:
        for name in ("Engine", "find_models"):
            getattr(edgemoe, name)


class JobThread(QThread):
    """Signals of this object may be emitted by its jobs: the window gets them in its own thread."""

    failed = Signal(str)
    """A sentence for the user."""

    def __init__(self) -> None:
        super().__init__()
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.start()

    def submit(self, job: Callable[[], None]) -> None:
        """Has `job` done after those before it. Returns at once."""
        self._jobs.put(job)

    def end(self) -> None:
        """Ends the thread after the jobs that it has; `finished` is emitted then. Returns at once."""
        self._jobs.put(None)

    def run(self) -> None:
        preload()
        for job in iter(self._jobs.get, None):
            try:
                job()
            except EdgeMoEError as error:
                # Every error that edgemoe raises on purpose is one sentence with what mends it.
                self.failed.emit(str(error))
            except Exception as error:
                traceback.print_exc()
                self.failed.emit(f"unexpected {type(error).__name__}: {error}")
