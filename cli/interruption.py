"""Ctrl-C while a reply is generated: the first asks the engine to stop, the second stops whatever is going on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType


class Interruption:
    """A `with` block in which the first Ctrl-C only sets `requested` and calls `cancel`; a second one raises.

    What the block does between (writing a result, keeping a reply's text) is therefore never torn.
    """

    def __init__(self, cancel: Callable[[], None]) -> None:
        self.requested = False
        self._cancel = cancel
        self._cancelling: threading.Thread | None = None
        self._previous: Callable[[int, FrameType | None], object] | int | None = None

    def __enter__(self) -> Interruption:
        # Only the main thread may set handlers, and a process told to ignore Ctrl-C (nohup) shall go on ignoring it.
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            self._previous = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
        if self._cancelling is not None:
            # A late cancel would hit the next generation.
            self._cancelling.join(timeout=1.0)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        # Not from here: the interrupted thread may hold the very lock that `cancel` needs.
        self._cancelling = threading.Thread(target=self._cancel, daemon=True)
        self._cancelling.start()
