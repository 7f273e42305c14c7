"""Chats on a terminal, as a person sees them."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import pytest

from tests.support.chat_terminal import ChatTerminal

PASTED = "first line\n/second line\n  third line"
PASTE_BEGINS, PASTE_ENDS = "\x1b[200~", "\x1b[201~"
PROGRESS = """
import time
from edgemoe.cli.chat.prompt_progress import PromptProgress
class Stream:
    prompt_tokens, prompt_done, finished = 1900, 475, False
progress = PromptProgress(Stream())
progress.start()
{until}
progress.stop()
progress.stop()
print("reply")
"""
INTERRUPTED = """
import threading, time
from edgemoe.cli.chat.answer import ask
class Stream:
    prompt_tokens, prompt_done, finished = 1900, 475, False
    def close(self): self.finished = True
class Engine:
    def stream(self, prompt, sampling): return Stream()
    def cancel(self): pass
def interrupted(thread, start=threading.Thread.start):
    start(thread)
    raise KeyboardInterrupt
threading.Thread.start = interrupted
try:
    ask(Engine(), None, None, None)
except KeyboardInterrupt:
    print("interrupted")
time.sleep(1.5)
print([thread.name for thread in threading.enumerate()])
"""


def test_a_chat_on_a_terminal(tmp_path: Path) -> None:
    chat = ChatTerminal()
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
    time.sleep(0.5)  # until readline waits for the next key again
    chat.press("\x03")
    chat.wait_for(">>> ")
    chat.press("/show\n")
    assert "messages            4\n" in chat.wait_for(">>> ")
    chat.press("\x04")
    assert chat.close() == 0
    history = (tmp_path / "state" / "edgemoe" / "history").read_text().splitlines()
    assert history == ["Hello", "count", "/show"]


def test_a_terminal_chat_may_start_with_a_message() -> None:
    chat = ChatTerminal("-p", "Good morning")
    assert "You said Good morning\n" in chat.wait_for(">>> ")
    chat.press("/bye\n")
    assert chat.close() == 0


def test_a_history_that_cannot_be_kept_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/dev/null")
    chat = ChatTerminal()
    chat.wait_for(">>> ")
    chat.press("\x04")
    assert chat.close() == 0


@pytest.mark.parametrize("term", ["dumb", "xterm"])
def test_pasted_lines_are_one_message(term: str) -> None:
    chat = ChatTerminal(term=term)
    chat.wait_for(">>> ")
    if term == "xterm":
        time.sleep(0.2)  # until readline has asked the terminal to mark what is pasted
        chat.press(PASTE_BEGINS + PASTED.replace("\n", "\r") + PASTE_ENDS)
    else:
        chat.press(PASTED)
    chat.wait_for("third line")
    chat.press("\r")
    assert f"You said {PASTED}\n" in chat.wait_for(">>> ").replace("\r", "")
    chat.press("/show\n")
    assert "messages            2\n" in chat.wait_for(">>> ").replace("\r", "")
    chat.press("\x04")
    assert chat.close() == 0


def test_a_paste_that_ends_with_a_line_end_is_sent_at_once() -> None:
    chat = ChatTerminal()
    chat.wait_for(">>> ")
    chat.press("one\ntwo\nthree\n")
    assert "You said one\ntwo\nthree\n" in chat.wait_for(">>> ")
    chat.press("/bye\n")
    assert chat.close() == 0


def test_lines_that_are_typed_during_a_reply_are_a_message_each() -> None:
    chat = ChatTerminal("-p", "count", "-n", "60")
    chat.wait_for(" 2 3")
    chat.press("Hello\n/show\n")
    assert "\nYou said Hello\n" in chat.wait_for("messages            4\n")
    chat.wait_for(">>> ")
    chat.press("\x04")
    assert chat.close() == 0


def test_a_question_on_a_terminal_is_answered_once() -> None:
    chat = ChatTerminal("How", "are you?")
    chat.wait_for("You said How are you?\n")
    assert chat.close() == 0


def test_a_reply_cannot_operate_the_terminal() -> None:
    chat = ChatTerminal("evil", term="xterm")
    assert chat.wait_for("\\x0de\n").endswith("\x1b[2Ka\\x1b]0;x\\x07b\\x9bc\\u202ed\\x0de\n")
    assert chat.close() == 0


def test_tab_completes_commands_settings_and_paths(tmp_path: Path) -> None:
    (tmp_path / "a poem.txt").write_text("Roses")
    chat = ChatTerminal()
    chat.wait_for(">>> ")
    chat.press("/sh\t")
    chat.wait_for("/show")
    chat.press("\n")
    chat.wait_for(">>> ")
    chat.press("/set max\t7\n")
    chat.wait_for("max_tokens = 7\n")
    chat.wait_for(">>> ")
    chat.press(f"/read {tmp_path}/a\t\n")
    chat.wait_for("Read 5 characters")
    chat.wait_for(">>> ")
    chat.press("a\tb\n")
    chat.wait_for("You said Roses\na")
    chat.wait_for(">>> ")
    chat.press("\x04")
    assert chat.close() == 0


def test_ctrl_c_while_loading_leaves_at_once() -> None:
    code = "import sys; from edgemoe.cli.main import main; sys.exit(main(['chat']))"
    chat = ChatTerminal(command=(sys.executable, "-c", code), term="xterm")
    chat.wait_for("importing PyTorch")
    time.sleep(0.5)
    begun = time.monotonic()
    chat.press("\x03")
    chat.wait_for("edgemoe: error: interrupted\n")
    assert chat.close() == 130
    assert time.monotonic() - begun < 60


@pytest.mark.parametrize("columns", [40, 60, 200])
def test_the_bar_of_loading_stays_on_one_line(columns: int) -> None:
    code = (
        "import time; from edgemoe.cli.progress_bar import progress_bar; from edgemoe.results import Progress\n"
        "with progress_bar('importing PyTorch') as show:\n"
        "    time.sleep(0.3); show(Progress('experts', 12 << 20, 300 << 20)); time.sleep(0.3)\n"
        "print('done')"
    )
    chat = ChatTerminal(command=(sys.executable, "-c", code), term="xterm", columns=columns, NO_COLOR="1")
    shown = chat.wait_for("done")
    assert chat.close() == 0
    assert "12.0/300.0 MiB" in shown
    assert "?" not in shown.replace("[?25", "")
    # One line up at most, where the bar is taken away.
    assert "\x1b[2A" not in shown
    lines = shown.replace("\r", "\n").split("\n")
    assert max(len(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line)) for line in lines) <= columns


@pytest.mark.parametrize("columns", [40, 60])
def test_a_slow_prompt_has_a_bar_until_the_reply_begins(columns: int) -> None:
    code = PROGRESS.format(until="input()")
    chat = ChatTerminal(command=(sys.executable, "-c", code), term="xterm", columns=columns, NO_COLOR="1")
    chat.wait_for("475/1900 tokens")
    chat.press("\n")
    assert chat.wait_for("reply").endswith("\x1b[2Kreply")
    assert chat.close() == 0


def test_a_quick_prompt_has_no_bar() -> None:
    chat = ChatTerminal(command=(sys.executable, "-c", PROGRESS.format(until="time.sleep(0.1)")), term="xterm")
    assert chat.wait_for("reply") == "reply"
    assert chat.close() == 0


def test_a_prompt_that_is_interrupted_as_its_bar_begins_leaves_no_bar() -> None:
    chat = ChatTerminal(command=(sys.executable, "-c", INTERRUPTED), term="xterm")
    assert chat.wait_for("]\n") == "interrupted\n['MainThread']\n"
    assert chat.close() == 0


def test_the_bar_of_a_prompt_ends_with_its_stream() -> None:
    code = PROGRESS.replace("progress.stop()", "Stream.finished = True; time.sleep(1)").format(until="input()")
    chat = ChatTerminal(command=(sys.executable, "-c", code + "print('end')"), term="xterm")
    chat.wait_for("475/1900")
    chat.press("\n")
    assert chat.wait_for("reply").endswith("\x1b[2Kreply")
    assert chat.wait_for("end") == "\nend"
    assert chat.close() == 0
