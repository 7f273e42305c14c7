"""Whole conversations, compared with everything a person would see: what is typed, replied and said."""

from __future__ import annotations

import io
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from edgemoe.cli import interruption
from edgemoe.cli.chat import answer, conversation, repl
from edgemoe.cli.chat.conversation import Conversation
from edgemoe.cli.chat.repl import Repl
from edgemoe.cli.chat.session import Session
from edgemoe.errors import CheckpointError, RequestError
from edgemoe.sampling import Sampling
from tests.support.fake_engine import FakeEngine
from tests.support.signal_points import SignalPoints

CTRL_C = KeyboardInterrupt()
PRESS = "Ctrl-C"
"""A line that is not typed: the key is pressed, as the system tells it."""


class Terminal:
    """Types lines and keeps the transcript: both streams as they appear, and standard output alone."""

    def __init__(self, typed: Sequence[str | BaseException]) -> None:
        self._typed = list(typed)
        self.shown = io.StringIO()
        self.out = _Tee(self.shown)
        self.err = _Tee(self.shown)

    def read_line(self, prompt: str) -> str:
        self.shown.write(prompt)
        line = self._typed.pop(0) if self._typed else EOFError()
        if line == PRESS:
            signal.raise_signal(signal.SIGINT)
        if isinstance(line, BaseException):
            raise line
        self.shown.write(f"{line}\n")
        return line


class _Tee(io.StringIO):
    def __init__(self, other: io.StringIO) -> None:
        super().__init__()
        self._other = other

    def write(self, text: str) -> int:
        self._other.write(text)
        return super().write(text)


def chat(
    engine: FakeEngine, *typed: str | BaseException, opening: str | None = None, verbose: bool = False
) -> tuple[str, Session, Terminal]:
    """The transcript of a chat, its session and its terminal."""
    terminal = Terminal(typed)
    session = Session(engine, Conversation(), Sampling())
    loop = Repl(session, read_line=terminal.read_line, out=terminal.out, err=terminal.err, verbose=verbose)
    loop.run(opening)
    return terminal.shown.getvalue(), session, terminal


def contents(session: Session) -> list[str]:
    return [message["content"] for message in session.conversation.messages]


def test_a_conversation() -> None:
    engine = FakeEngine(replies={"Hello": "Hi! How are you?", "Fine": "Good."})
    transcript, session, terminal = chat(engine, "Hello", "", "  Fine  ")
    assert transcript == (
        ">>> Hello\n"
        "Hi! How are you?\n"
        ">>> \n"
        ">>>   Fine  \n"
        "Good.\n"
        ">>> \n"
    )  # fmt: skip
    assert terminal.out.getvalue() == "Hi! How are you?\nGood.\n"
    assert contents(session) == ["Hello", "Hi! How are you?", "Fine", "Good."]
    assert engine.prompts[-1] == "<user>Hello<assistant>Hi! How are you?<user>Fine"


def test_leaving_by_command() -> None:
    transcript, _, _ = chat(FakeEngine(), "/bye", "never typed")
    assert transcript == ">>> /bye\n"


def test_a_message_of_several_lines() -> None:
    engine = FakeEngine()
    transcript, session, _ = chat(engine, '"""', "/first", "", 'second"""', '"""/one line"""')
    assert transcript == (
        '>>> """\n'
        "... /first\n"
        "... \n"
        '... second"""\n'
        "You said /first\n"
        "\n"
        "second\n"
        '>>> """/one line"""\n'
        "You said /one line\n"
        ">>> \n"
    )
    assert contents(session)[0] == "/first\n\nsecond"
    assert contents(session)[2] == "/one line"


def test_an_unknown_command_never_reaches_the_model() -> None:
    engine = FakeEngine()
    transcript, _, _ = chat(engine, "/frob now")
    assert transcript == (
        ">>> /frob now\n"
        'edgemoe: error: unknown command /frob; /help lists them, and """/frob now""" sends it as a message\n'
        ">>> \n"
    )
    assert engine.prompts == []


def test_settings_reach_the_next_reply() -> None:
    engine = FakeEngine()
    transcript, _, _ = chat(engine, "/set max_tokens 2", "/system Be brief.", "Hello there")
    assert transcript == (
        ">>> /set max_tokens 2\n"
        "max_tokens = 2\n"
        ">>> /system Be brief.\n"
        "The system prompt is set.\n"
        ">>> Hello there\n"
        "You said\n"
        ">>> \n"
    )
    assert engine.samplings == [Sampling(max_tokens=2)]
    assert engine.prompts == ["<system>Be brief.<user>Hello there"]


def test_undo_and_another_reply() -> None:
    engine = FakeEngine()
    transcript, session, _ = chat(engine, "one", "two", "/regen", "/undo", "/retry", "/undo", "/retry")
    assert transcript == (
        ">>> one\n"
        "You said one\n"
        ">>> two\n"
        "You said two\n"
        ">>> /regen\n"
        "You said two\n"
        ">>> /undo\n"
        "Took back: two\n"
        ">>> /retry\n"
        "You said one\n"
        ">>> /undo\n"
        "Took back: one\n"
        ">>> /retry\n"
        "edgemoe: error: there is no message to reply to yet\n"
        ">>> \n"
    )
    assert contents(session) == []
    assert engine.prompts[2] == "<user>one<assistant>You said one<user>two"


def test_an_error_is_a_sentence_and_the_chat_goes_on_without_the_message() -> None:
    engine = FakeEngine(replies={"long": RequestError("the prompt has 900 tokens of 512; give -c 900")})
    transcript, session, _ = chat(engine, "long", "short")
    assert transcript == (
        ">>> long\nedgemoe: error: the prompt has 900 tokens of 512; give -c 900\n>>> short\nYou said short\n>>> \n"
    )
    assert contents(session) == ["short", "You said short"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("device lost"), "unexpected RuntimeError: device lost"),
        (MemoryError("no room"), "unexpected MemoryError: no room"),
        (CheckpointError("shard 2 ends too early; fetch it again"), "shard 2 ends too early; fetch it again"),
    ],
)
def test_what_breaks_a_reply_does_not_break_the_chat(error: Exception, said: str) -> None:
    replies: dict[str, str | Exception] = {"a": "first"}
    engine = FakeEngine(replies=replies)
    replies["b"] = error
    transcript, session, _ = chat(engine, "a", "b", "/regen")
    assert f">>> b\nedgemoe: error: {said}\n>>> /regen\nfirst\n" in transcript
    assert contents(session) == ["a", "first"]


def test_another_reply_that_fails_leaves_the_old_one() -> None:
    replies: dict[str, str | Exception] = {"a": "first"}

    class Fickle(FakeEngine):
        def cancel(self, *, running: bool = True) -> None:
            return

    engine = Fickle(replies=replies)
    terminal = Terminal([])
    session = Session(engine, Conversation(), Sampling())
    repl = Repl(session, read_line=terminal.read_line, out=terminal.out, err=terminal.err)
    repl.send("a")
    replies["a"] = RequestError("no more")
    repl.reply_again()
    assert contents(session) == ["a", "first"]


def test_ctrl_c_stops_the_reply_and_keeps_its_text() -> None:
    engine = FakeEngine(replies={"count": "1 2 3 4 5"})
    engine.before_word = lambda word: signal.raise_signal(signal.SIGINT) if engine.prompts == ["<user>count"] and (
        word == 2
    ) else None  # fmt: skip
    before = signal.getsignal(signal.SIGINT)
    transcript, session, _ = chat(engine, "count", "go on")
    first, reply, rest = transcript.split("\n", 2)
    assert first == ">>> count"
    assert reply in ("1 2", "1 2 3")
    assert rest == ">>> go on\nYou said go on\n>>> \n"
    assert contents(session) == ["count", reply, "go on", "You said go on"]
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_before_the_first_word_takes_the_message_back() -> None:
    class Prompt(FakeEngine):
        def cancel(self, *, running: bool = True) -> None:
            self.cancelled = True

        def interrupt(self, word: int) -> None:
            signal.raise_signal(signal.SIGINT)
            self.cancelled = True

    engine = Prompt()
    engine.before_word = engine.interrupt
    transcript, session, _ = chat(engine, "slow")
    assert transcript == ">>> slow\n\n(no reply came, so the message is not kept)\n>>> \n"
    assert contents(session) == []


def test_a_second_ctrl_c_breaks_off_at_once() -> None:
    class Deaf(FakeEngine):
        def cancel(self, *, running: bool = True) -> None:
            return

    engine = Deaf(before_word=lambda word: signal.raise_signal(signal.SIGINT))
    transcript, session, _ = chat(engine, "a b c")
    assert transcript == ">>> a b c\nYou\n>>> \n"
    assert contents(session) == []


def test_ctrl_c_at_the_prompt_clears_the_line() -> None:
    transcript, session, _ = chat(FakeEngine(), CTRL_C, '"""', "half a", CTRL_C, "Hello")
    assert transcript == '>>> \n>>> """\n... half a\n... \n>>> Hello\nYou said Hello\n>>> \n'
    assert contents(session) == ["Hello", "You said Hello"]


def test_a_line_that_is_no_text() -> None:
    broken = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
    transcript, _, _ = chat(FakeEngine(), broken, "Hello")
    assert transcript == ">>> edgemoe: error: that line is not UTF-8 text\n>>> Hello\nYou said Hello\n>>> \n"


def test_a_file_goes_before_the_next_message(tmp_path: Path) -> None:
    (tmp_path / "poem").write_text("Roses\n")
    replies: dict[str, str | Exception] = {"Roses\nShort": RequestError("no")}
    _, session, _ = chat(FakeEngine(replies=replies), f"/read {tmp_path / 'poem'}", "Short", "Long", "Next")
    assert contents(session) == ["Roses\nLong", "You said Roses\nLong", "Next", "You said Next"]


def test_an_opening_message_is_answered_first() -> None:
    transcript, session, _ = chat(FakeEngine(), "/bye", opening="/not a command")
    assert transcript == "You said /not a command\n>>> /bye\n"
    assert contents(session) == ["/not a command", "You said /not a command"]


def test_verbose_adds_the_timings_outside_standard_output() -> None:
    transcript, _, terminal = chat(FakeEngine(), "Hi", verbose=True)
    assert transcript == (
        ">>> Hi\n"
        "You said Hi\n"
        "prompt 8 tokens at 10.0/s, generated 3 tokens at 4.0/s, hit rate 75.0%, 1.0 KiB a token\n"
        "3 steps, each 512 B demanded, 256 B prefetched in time, 192 B late, 64 B in vain, link wait 1.00 ms\n"
        "speculation off: asked for\n"
        "context: 11 of 512 tokens\n"
        ">>> \n"
    )
    assert terminal.out.getvalue() == "You said Hi\n"


def test_verbose_tells_of_the_drafts_of_each_reply_alone() -> None:
    transcript, _, _ = chat(FakeEngine(drafts=True), "Hi", "Go on please", verbose=True)
    assert re.findall("^.*draft.*$", transcript, re.MULTILINE) == [
        "prompt 8 tokens at 10.0/s, generated 3 tokens at 4.0/s, hit rate 75.0%, 1.0 KiB a token, "
        "3 of 9 drafted tokens accepted",
        "3 cycles of speculation, each 3.00 tokens drafted, 1.00 accepted, 2.00 generated, "
        "draft 2.00 ms, verify 10.0 ms",
        "prompt 48 tokens at 10.0/s, generated 5 tokens at 4.0/s, hit rate 75.0%, 1.0 KiB a token, "
        "5 of 15 drafted tokens accepted",
        "5 cycles of speculation, each 3.00 tokens drafted, 1.00 accepted, 2.00 generated, "
        "draft 2.00 ms, verify 10.0 ms",
    ]


def test_stats_tell_of_the_last_reply() -> None:
    transcript, _, _ = chat(FakeEngine(), "Hi", "/stats")
    assert re.search("^hit rate +75.0% +9 of 12 experts asked for$", transcript, re.MULTILINE)
    assert "\nlast reply: prompt 8 tokens" in transcript


def test_a_second_ctrl_c_at_once_does_not_end_the_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    write, pressed = _Tee.write, list[str]()

    def pressed_again(tee: _Tee, text: str) -> int:
        if text == "\n" and not pressed:
            pressed.append(text)
            signal.raise_signal(signal.SIGINT)
        return write(tee, text)

    monkeypatch.setattr(_Tee, "write", pressed_again)
    transcript, _, _ = chat(FakeEngine(replies={"Hello": "Hi!"}), PRESS, "Hello")
    assert pressed
    assert "Hi!" in transcript


def talkative() -> FakeEngine:
    return FakeEngine()


def failing() -> FakeEngine:
    return FakeEngine(replies={"Hello": RequestError("no more")})


def pressed_twice() -> FakeEngine:
    """Its first word ends a reply, and then the chat's waiting for it."""

    class Deaf(FakeEngine):
        def cancel(self, *, running: bool = True) -> None:
            return

    engine = Deaf()

    def press(word: int) -> None:
        if len(engine.prompts) == 1:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    engine.before_word = press
    return engine


@pytest.mark.parametrize("make", [talkative, failing, pressed_twice])
def test_ctrl_c_at_any_instruction_of_the_chat_leaves_whole_exchanges(
    make: Callable[[], FakeEngine], tmp_path: Path
) -> None:
    """Each run is interrupted at one event later than the one before, and the chat goes on every time."""
    (tmp_path / "poem").write_text("Roses")
    files = tuple(str(module.__file__) for module in (repl, interruption, conversation, answer))
    outside = signal.getsignal(signal.SIGINT)
    number = 0
    pressed = True
    while pressed:
        number += 1
        pressed, events, points = False, 0, SignalPoints()

        def press(frame: FrameType, event: str, argument: object) -> Any:
            nonlocal pressed, events
            # Python keeps to itself what is raised in the end of a generator.
            strange = frame.f_code.co_filename not in files or frame.f_code.co_name == "<genexpr>"
            if strange or signal.getsignal(signal.SIGINT) == outside:
                return press if frame.f_code.co_name == "run" else None
            events += points.has(frame, event)  # noqa: B023 - the trace ends with the run
            if events == number and not pressed:  # noqa: B023
                pressed = True
                signal.raise_signal(signal.SIGINT)
            return press

        before = sys.gettrace()
        sys.settrace(press)
        try:
            _, session, _ = chat(make(), f"/read {tmp_path}/poem", "Hello", "/regen", "Good")
        finally:
            sys.settrace(before)
        roles = [message["role"] for message in session.conversation.messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2), number
        # The file goes with one message at most.
        said = sum("Roses" in message["content"] for message in session.conversation.messages[::2])
        assert said + len(session.attached) <= 1, number
        # One of the lines is lost at most.
        assert len(roles) >= (2 if make is talkative else 0), number
    assert number > 100
