from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from edgemoe.cli.main import main
from edgemoe.errors import RequestError
from tests.support import ROOT
from tests.support.fake_engine import FakeEngine, FakeFactory, FakePlan

PipeIn = Callable[[bytes], None]


def test_what_is_piped_in_is_answered_once(
    factory: FakeFactory, pipe_in: PipeIn, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe_in("é\n/help\n".encode())
    assert main(["chat", "-m", "x"], engine=factory) == 0
    assert capsys.readouterr() == ("You said é\n/help\n", "")
    assert factory.engine.prompts == ["<user>é\n/help"]
    assert factory.engine.closed


def test_the_message_is_the_prompt_then_the_file_then_what_is_piped_in(
    factory: FakeFactory, pipe_in: PipeIn, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("file\n")
    pipe_in(b"piped\n")
    assert main(["chat", "-p", "prompt", "-f", str(tmp_path / "file"), "-sys", "s"], engine=factory) == 0
    assert factory.engine.prompts == ["<system>s<user>prompt\nfile\npiped"]


def test_with_a_prompt_nothing_need_be_piped_in(
    factory: FakeFactory, pipe_in: PipeIn, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe_in(b"")
    assert main(["chat", "-m", "x", "-p", "Hi", "-n", "2", "-v"], engine=factory) == 0
    out, err = capsys.readouterr()
    assert out == "You said\n"
    assert err.splitlines()[-3:] == [
        "edgemoe: prompt 8 tokens at 10.0/s, generated 2 tokens at 4.0/s, hit rate 75.0%, 1.0 KiB a token",
        "edgemoe: 2 steps, each 512 B demanded, 256 B prefetched in time, 192 B late, 64 B in vain, link wait 1.00 ms",
        "edgemoe: speculation off: asked for",
    ]


def test_no_message_at_all_is_wrong_usage(
    factory: FakeFactory, pipe_in: PipeIn, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe_in(b"\n")
    assert main(["chat"], engine=factory) == 2
    assert factory.asked == []
    assert "there is no message: standard input is empty; give one with -p" in capsys.readouterr().err


def test_a_closed_standard_input_is_an_empty_one(
    factory: FakeFactory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["chat", "-m", "x", "-p", "Hi"], engine=factory) == 0
    assert capsys.readouterr().out == "You said Hi\n"


@pytest.mark.parametrize("argv", [["-f", "/no/such/file"], []])
def test_file_trouble_is_told_before_loading(argv: list[str], factory: FakeFactory, pipe_in: PipeIn) -> None:
    pipe_in(b"\xff")
    assert main(["chat", *argv], engine=factory) == 5
    assert factory.asked == []


def test_a_model_without_a_chat_template_is_refused(pipe_in: PipeIn, capsys: pytest.CaptureFixture[str]) -> None:
    pipe_in(b"Hi")
    engine = FakeEngine(has_chat_template=False)
    assert main(["chat", "-m", "x"], engine=FakeFactory(engine)) == 3
    assert capsys.readouterr().err == (
        "edgemoe: error: fake has no chat template; complete raw prompts with 'edgemoe run'\n"
    )
    assert engine.closed


def test_a_refused_message_is_exit_code_1(pipe_in: PipeIn, capsys: pytest.CaptureFixture[str]) -> None:
    pipe_in(b"Hi")
    engine = FakeEngine(replies={"Hi": RequestError("too long; give -c 900")})
    assert main(["chat", "-m", "x"], engine=FakeFactory(engine)) == 1
    assert capsys.readouterr() == ("", "edgemoe: error: too long; give -c 900\n")


def test_ctrl_c_ends_the_answer(pipe_in: PipeIn, capsys: pytest.CaptureFixture[str]) -> None:
    pipe_in(b"a b c")
    engine = FakeEngine(before_word=lambda word: signal.raise_signal(signal.SIGINT) if word == 1 else None)
    assert main(["chat", "-m", "x"], engine=FakeFactory(engine)) == 130
    out, err = capsys.readouterr()
    assert out in ("You\n", "You said\n")
    assert err == "edgemoe: error: interrupted\n"


def test_a_simulation_is_always_named(pipe_in: PipeIn, capsys: pytest.CaptureFixture[str]) -> None:
    pipe_in(b"Hi")
    engine = FakeEngine(plan=FakePlan(simulation="simulation: a link of 2 GB/s"))
    assert main(["chat", "-m", "x"], engine=FakeFactory(engine)) == 0
    assert capsys.readouterr().err == "edgemoe: simulation: a link of 2 GB/s\n"


def test_characters_that_the_terminal_cannot_show_do_not_end_the_reply() -> None:
    code = "import sys; from edgemoe.cli.main import main; from tests.support.fake_engine import FakeFactory\n"
    code += "sys.exit(main(['chat', '-m', 'x', '-p', 'caf\\u00e9 \\u2615 ok'], engine=FakeFactory()))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, check=False,
        env={**os.environ, "PYTHONIOENCODING": "ascii"}, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, b"You said caf? ? ok\n"), done.stderr


# --- on a terminal -------------------------------------------------------------------------------

SLOW_CHAT = """
import sys, time
from tests.support.fake_engine import FakeEngine, FakeFactory
from edgemoe.cli.main import main
def slowly(word):
    if word: time.sleep(0.05)
engine = FakeEngine(replies={"count": " ".join(map(str, range(600)))}, before_word=slowly)
sys.exit(main(["chat", "-m", "x", *sys.argv[1:]], engine=FakeFactory(engine)))
"""


class Pty:
    """A chat on a terminal of its own, with a keyboard and a screen."""

    def __init__(self, *argv: str) -> None:
        keyboard, terminal = pty.openpty()
        self._fd = keyboard
        self._screen = ""
        self.process = subprocess.Popen(
            [sys.executable, "-c", SLOW_CHAT, *argv], cwd=ROOT, stdin=terminal, stdout=terminal, stderr=terminal,
            start_new_session=True, preexec_fn=lambda: _take_terminal(terminal),
            env={**os.environ, "TERM": "dumb"},
        )  # fmt: skip
        os.close(terminal)

    def press(self, keys: str) -> None:
        os.write(self._fd, keys.encode())

    def wait_for(self, text: str) -> str:
        """What the screen shows up to and with a text; the next wait begins after it."""
        deadline = time.monotonic() + 20
        while text not in self._screen:
            ready, _, _ = select.select([self._fd], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"no {text!r} in {self._screen!r}"
            self._screen += os.read(self._fd, 4096).decode().replace("\r\n", "\n")
        before, _, self._screen = self._screen.partition(text)
        return before + text

    def close(self) -> int:
        code = self.process.wait(timeout=20)
        os.close(self._fd)
        return code


def _take_terminal(terminal: int) -> None:
    import fcntl
    import termios

    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)


def test_a_chat_on_a_terminal(tmp_path: Path) -> None:
    chat = Pty()
    assert "/help lists the commands, Ctrl-D leaves" in chat.wait_for(">>> ")
    chat.press("Hello\n")
    assert chat.wait_for(">>> ").endswith("Hello\nYou said Hello\n>>> ")
    chat.press("count\n")
    chat.wait_for(" 2 3")
    chat.press("\x03")
    stopped = chat.wait_for(">>> ")
    assert "599" not in stopped
    chat.press("half a line")
    chat.wait_for("half a line")
    time.sleep(0.1)  # until readline waits for the next key again
    chat.press("\x03")
    chat.wait_for(">>> ")
    chat.press("/show\n")
    assert "messages            4\n" in chat.wait_for(">>> ")
    chat.press("\x04")
    assert chat.close() == 0
    history = (tmp_path / "state" / "edgemoe" / "history").read_text().splitlines()
    assert history == ["Hello", "count", "/show"]


def test_a_terminal_chat_may_start_with_a_message() -> None:
    chat = Pty("-p", "Good morning")
    assert "You said Good morning\n" in chat.wait_for(">>> ")
    chat.press("/bye\n")
    assert chat.close() == 0


def test_a_history_that_cannot_be_kept_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/dev/null")
    chat = Pty()
    chat.wait_for(">>> ")
    chat.press("\x04")
    assert chat.close() == 0
