"""A chat with a fake engine on a terminal of its own, with a keyboard and a screen."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time

from tests.support import ROOT

SLOW_CHAT = """
import sys, time
from tests.support.fake_engine import FakeEngine, FakeFactory, FakePlan
from edgemoe.cli.main import main
def slowly(word):
    if word: time.sleep(0.05)
replies = {"count": " ".join(map(str, range(400))), "evil": "a\\x1b]0;x\\x07b\\x9bc\\u202ed\\re"}
engine = FakeEngine(replies=replies, before_word=slowly, plan=FakePlan(context=2000))
sys.exit(main(["chat", "-m", "x", *sys.argv[1:]], engine=FakeFactory(engine)))
"""
_PATIENCE = 60
"""Seconds for what takes a moment, on a machine with much else to do."""


class ChatTerminal:
    """`edgemoe chat` in a process, connected to a terminal of `columns` columns."""

    def __init__(
        self,
        *argv: str,
        command: tuple[str, ...] = (sys.executable, "-c", SLOW_CHAT),
        term: str = "dumb",
        columns: int = 80,
        **environment: str,
    ) -> None:
        keyboard, terminal = pty.openpty()
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self._fd = keyboard
        self._screen = ""
        # The width of a terminal around the tests is none of this one's.
        inherited = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            [*command, *argv], cwd=ROOT, stdin=terminal, stdout=terminal, stderr=terminal,
            start_new_session=True, preexec_fn=lambda: fcntl.ioctl(terminal, termios.TIOCSCTTY, 0),
            env={**inherited, "TERM": term, **environment},
        )  # fmt: skip
        os.close(terminal)

    def press(self, keys: str) -> None:
        """Type."""
        os.write(self._fd, keys.encode())

    def wait_for(self, text: str) -> str:
        """What the screen shows up to and with a text; the next wait begins after it."""
        deadline = time.monotonic() + _PATIENCE
        while text not in self._screen:
            ready, _, _ = select.select([self._fd], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"no {text!r} in {self._screen!r}"
            self._screen += os.read(self._fd, 4096).decode().replace("\r\n", "\n")
        before, _, self._screen = self._screen.partition(text)
        return before + text

    def close(self) -> int:
        """The exit code, when the process has ended."""
        code = self.process.wait(timeout=_PATIENCE)
        os.close(self._fd)
        return code
