"""Ctrl-C while something is generated: each one takes the next step towards the end."""

from __future__ import annotations

import os
import signal
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, TypeVar

from edgemoe.cli.exits import Exit

Handler = TypeVar("Handler", bound="_Handler")
_ERASE_LINE, _SHOW_CURSOR = "\r\x1b[2K", "\x1b[?25h"


@contextmanager
def leaving_at_once() -> Iterator[None]:
    """A block in which Ctrl-C ends the process with one line, and nothing is unwound.

    For imports and loading, which leave nothing behind: PyTorch's import takes a KeyboardInterrupt for an answer to
    some question of its own, and goes on in pieces.
    """
    mine = threading.current_thread() is threading.main_thread()
    if not mine or signal.getsignal(signal.SIGINT) != signal.default_int_handler:
        # A process told to ignore Ctrl-C goes on ignoring it.
        yield
        return
    signal.signal(signal.SIGINT, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(number: int, frame: FrameType | None) -> None:
    animated = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    line = f"{_ERASE_LINE + _SHOW_CURSOR if animated else ''}edgemoe: error: interrupted\n"
    try:
        # Not through sys.stderr, which may be in the middle of a write.
        os.write(2, line.encode())
    finally:
        os._exit(Exit.INTERRUPTED)


class _Handler(ABC):
    """A `with` block in which `_handle` is the handler of some signals; afterwards it is the one before again."""

    def __init__(self, signals: Sequence[int]) -> None:
        self._signals = signals
        self._previous: dict[int, Any] = {}

    @abstractmethod
    def _handle(self, number: int, frame: FrameType | None) -> None:
        """As Python calls it, with the signal's number."""

    def __enter__(self: Handler) -> Handler:
        # Only the main thread may set handlers, and a process told to ignore Ctrl-C (nohup) shall go on ignoring it.
        if threading.current_thread() is threading.main_thread():
            for number in self._signals:
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, previous in self._previous.items():
            if previous is not None:  # None is a handler that was not set from Python
                signal.signal(number, previous)


class KeyboardInterrupts(_Handler):
    """A `with` block in which Ctrl-C raises KeyboardInterrupt inside of `allowed` alone, and once in each such block.

    Another one, or one that comes between two such blocks, or after `forbid`, does nothing: none is raised where
    nothing takes it.
    """

    def __init__(self) -> None:
        super().__init__((signal.SIGINT,))
        self._allowed = False

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """A block in which the first Ctrl-C raises KeyboardInterrupt."""
        self._allowed = True
        try:
            yield
        finally:
            self._allowed = False

    def forbid(self) -> None:
        """Lets no Ctrl-C raise anything any more in the `allowed` block under way."""
        self._allowed = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._allowed:
            self._allowed = False
            raise KeyboardInterrupt


class Interruption(_Handler):
    """A `with` block in which the first Ctrl-C carries out the first of `steps`, the second the second, and so on.

    Until the steps are used up, nothing is raised: what the block does between (writing a result, keeping a reply's
    text) is never torn. The next one raises KeyboardInterrupt.
    """

    def __init__(self, *steps: Callable[[], None], signals: Sequence[int] = (signal.SIGINT,)) -> None:
        super().__init__(signals)
        self.count = 0
        self._steps = steps
        self._threads: list[threading.Thread] = []
        self._waiting = False

    @property
    def requested(self) -> bool:
        """Whether there was a Ctrl-C."""
        return self.count > 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A block that waits for something from outside: there, the first Ctrl-C raises KeyboardInterrupt too."""
        self._waiting = True
        try:
            yield
        finally:
            self._waiting = False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        for thread in self._threads:
            # A late cancel would hit the next generation.
            thread.join(timeout=1.0)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # Another signal may come anywhere in here: at worst it takes the same step.
        taken = self.count
        self.count = taken + 1
        if taken >= len(self._steps):
            raise KeyboardInterrupt
        step = self._steps[taken]
        # Not from here: the interrupted thread may hold the very lock that the step needs.
        thread = threading.Thread(target=step, daemon=True)
        thread.start()
        self._threads.append(thread)
        if self._waiting:
            self._waiting = False
            raise KeyboardInterrupt
