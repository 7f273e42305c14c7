from __future__ import annotations

import os
import signal
import subprocess
import sys
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


def test_a_question_is_answered_and_what_is_piped_in_goes_before_it(
    factory: FakeFactory, pipe_in: PipeIn, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe_in(b"a long text\n")
    assert main(["chat", "Summarise", "that", "--temp", "0"], engine=factory) == 0
    assert factory.engine.prompts == ["<user>a long text\nSummarise that"]
    assert capsys.readouterr().out == "You said a long text\nSummarise that\n"
    pipe_in(b"")
    assert main(["chat", "--temp", "0", "Why?", "-m", "x"], engine=factory) == 0
    assert factory.engine.prompts[-1] == "<user>Why?"


def test_an_empty_question_is_wrong_usage(
    factory: FakeFactory, pipe_in: PipeIn, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe_in(b"")
    assert main(["chat", " "], engine=factory) == 2
    assert "the question is empty" in capsys.readouterr().err
    assert factory.asked == []


def test_an_endless_input_is_refused_before_loading(
    factory: FakeFactory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("edgemoe.cli.chat.text_file.MAX_BYTES", 1000)
    with open("/dev/zero") as endless:
        monkeypatch.setattr(sys, "stdin", endless)
        assert main(["chat"], engine=factory) == 5
        assert main(["chat", "-f", "/dev/zero"], engine=factory) == 5
    assert factory.asked == []
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("edgemoe: error: standard input has more than 1000 B, too much for a prompt")
    assert said[1].startswith("edgemoe: error: /dev/zero has more than")


def test_a_reply_that_the_context_cuts_is_told_of(pipe_in: PipeIn, capsys: pytest.CaptureFixture[str]) -> None:
    pipe_in(b"count")
    engine = FakeEngine(plan=FakePlan(context=15), replies={"count": "1 2 3 4 5 6"})
    assert main(["chat", "-m", "x"], engine=FakeFactory(engine)) == 0
    assert capsys.readouterr() == (
        "1 2 3 4\n",
        "edgemoe: (the reply was cut: context full, 15 of 15 tokens; start with a larger --ctx-size)\n",
    )


def test_a_message_that_does_not_fit_is_refused(pipe_in: PipeIn, capsys: pytest.CaptureFixture[str]) -> None:
    pipe_in(b"a message of some length")
    engine = FakeEngine(plan=FakePlan(context=20))
    assert main(["chat", "-m", "x"], engine=FakeFactory(engine)) == 1
    assert capsys.readouterr() == (
        "",
        "edgemoe: error: context full: this message would make it 30 of 20 tokens, the reply not counted: send a "
        "shorter one, or start with a larger --ctx-size\n",
    )
    assert engine.prompts == []


def test_a_reply_that_is_piped_on_is_as_the_model_made_it(pipe_in: PipeIn, capsys: pytest.CaptureFixture[str]) -> None:
    pipe_in(b"evil")
    engine = FakeEngine(replies={"evil": "a\x1b]0;x\x07\tb"})
    assert main(["chat", "-m", "x"], engine=FakeFactory(engine)) == 0
    assert capsys.readouterr().out == "a\x1b]0;x\x07\tb\n"


def test_no_message_sends_escape_sequences(pipe_in: PipeIn, capsys: pytest.CaptureFixture[str]) -> None:
    pipe_in(b"Hi")
    assert main(["chat", "-f", "/no/\x1b[31m\n\u202e"], engine=FakeFactory()) == 5
    assert capsys.readouterr().err.startswith("edgemoe: error: cannot read /no/\\x1b[31m\\n\\u202e: no such")


def test_a_misspelt_variable_is_told_of(
    factory: FakeFactory, pipe_in: PipeIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EDGEMOE_TEMPERATURE", "1")
    pipe_in(b"Hi")
    assert main(["chat", "-m", "x"], engine=factory) == 0
    assert capsys.readouterr() == (
        "You said Hi\n",
        "edgemoe: the variable EDGEMOE_TEMPERATURE is not known and does nothing (did you mean EDGEMOE_TEMP?)\n",
    )


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
