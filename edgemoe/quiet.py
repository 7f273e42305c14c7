"""Silences libraries while edgemoe uses them, in any number of threads."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Undo = Callable[[], None]


class _SharedChange:
    """A change of a process's state that lasts while any thread wants it: the first one makes it, the last undoes it.

    Each thread on its own would put back what it found, which may be what another one had changed.
    """

    def __init__(self, change: Callable[[], Undo]) -> None:
        """`change` makes the change and returns what undoes it."""
        self._change = change
        self._lock = threading.Lock()
        self._wanted = 0
        self._undo: Undo | None = None

    @contextmanager
    def wanted(self) -> Iterator[None]:
        """A context in which the change holds. May be nested."""
        counted = False
        # An interrupt may come anywhere in here.
        try:
            with self._lock:
                if self._wanted == 0:
                    self._undo = self._change()
                self._wanted += 1
                counted = True
            yield
        finally:
            with self._lock:
                self._wanted -= counted
                undo, self._undo = (self._undo, None) if self._wanted == 0 else (None, self._undo)
                if undo is not None:
                    undo()


def _silence_transformers() -> Undo:
    from transformers.utils import logging as told

    verbosity, bars = told.get_verbosity(), told.is_progress_bar_enabled()
    told.set_verbosity_error()
    told.disable_progress_bar()

    def undo() -> None:
        # What somebody else has set meanwhile stays.
        if told.get_verbosity() == logging.ERROR:
            told.set_verbosity(verbosity)
        if bars:
            told.enable_progress_bar()

    return undo


def _silencing(name: str) -> Callable[[], Undo]:
    def silence() -> Undo:
        logger = logging.getLogger(name)
        level = logger.level
        logger.setLevel(logging.ERROR)

        def undo() -> None:
            if logger.level == logging.ERROR:
                logger.setLevel(level)

        return undo

    return silence


_TRANSFORMERS = _SharedChange(_silence_transformers)
_LOGGERS: dict[str, _SharedChange] = {}
_MAKING = threading.Lock()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """A context without transformers' progress bars and warnings; both are restored when no thread is in it."""
    with _TRANSFORMERS.wanted():
        yield


@contextmanager
def quiet_logger(name: str) -> Iterator[None]:
    """A context in which the logger `name` drops what is below an error; its level is restored in the same way."""
    with _MAKING:
        change = _LOGGERS.setdefault(name, _SharedChange(_silencing(name)))
    with change.wanted():
        yield
