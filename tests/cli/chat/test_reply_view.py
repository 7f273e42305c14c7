from __future__ import annotations

import pytest

from edgemoe import Chunk
from edgemoe.cli.chat.reply_view import ReplyView
from tests.support.fake_engine import timings


def chunk(text: str = "", reasoning: str = "", finish: str | None = None) -> Chunk:
    return Chunk(text, (), finish, None, timings(1, 1), reasoning=reasoning)


def shown(*chunks: Chunk, terminal: bool) -> str:
    written: list[str] = []
    view = ReplyView(written.append, terminal=terminal)
    for each in chunks:
        view.add(each)
    view.close()
    return "".join(written)


REPLY = (
    chunk(reasoning="why\x1b[2J"),
    chunk(reasoning=" so"),
    chunk("An\x1b[31mswer\tis\n"),
    chunk("7", finish="stop"),
)


def test_reasoning_is_dim_and_nothing_operates_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert shown(*REPLY, terminal=True) == "\x1b[2mwhy\\x1b[2J so\x1b[0m\n\nAn\\x1b[31mswer\tis\n7"


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_reasoning_is_named_where_no_escape_sequences_are_wanted(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    assert shown(*REPLY, terminal=True) == ("[reasoning] why\\x1b[2J so [end of reasoning]\n\nAn\\x1b[31mswer\tis\n7")


def test_elsewhere_the_text_is_as_the_model_made_it() -> None:
    assert shown(*REPLY, terminal=False) == "An\x1b[31mswer\tis\n7"


def test_a_reply_that_breaks_off_in_its_reasoning_leaves_the_terminal_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert shown(chunk(reasoning="why"), terminal=True) == "\x1b[2mwhy\x1b[0m"
