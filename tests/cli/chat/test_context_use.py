"""Conversations that fill the context. A prompt's tokens are its characters, a reply's its words."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from edgemoe.cli.chat.conversation import Conversation
from edgemoe.cli.chat.repl import Repl
from edgemoe.cli.chat.session import Session
from edgemoe.cli.chat.slash import execute
from edgemoe.cli.exits import FileTrouble
from edgemoe.sampling import Sampling
from tests.support.fake_engine import FakeEngine, FakePlan

COUNTED = "1 2 3 4 5 6 7 8"


class Chat:
    """A chat with a model that has a small context, and what it says beside replies."""

    def __init__(
        self, context: int, *, shifts: bool = False, sampling: Sampling | None = None, system: str | None = None
    ):
        self.engine = FakeEngine(plan=FakePlan(context=context), replies={"count": COUNTED, "hi": "ho", "hm": "hm"})
        self.session = Session(self.engine, Conversation(system), sampling or Sampling(), shifts=shifts)
        self._said = io.StringIO()
        self._repl = Repl(self.session, read_line=input, out=io.StringIO(), err=self._said)

    def send(self, text: str) -> str:
        """What is said about a message, or a command."""
        self._said.seek(0)
        self._said.truncate()
        if text.startswith("/"):
            return execute(text, self.session).text
        self._repl.send(text)
        return self._said.getvalue()

    @property
    def contents(self) -> list[str]:
        return [message["content"] for message in self.session.conversation.messages]


def test_a_reply_that_the_context_cuts_says_so_and_what_makes_room() -> None:
    chat = Chat(15)
    assert chat.send("count") == (
        "(the reply was cut: context full, 15 of 15 tokens; /undo or /clear make room, or start with a larger "
        "--ctx-size or with --context-shift)\n"
    )
    assert chat.contents == ["count", "1 2 3 4"]
    refused = chat.send("hi")
    assert refused.startswith("edgemoe: error: context full: this message would make it 37 of 15 tokens")
    assert "make room with /undo or /clear, or start with a larger --ctx-size or with --context-shift" in refused
    assert chat.contents == ["count", "1 2 3 4"]
    assert len(chat.engine.prompts) == 1
    chat.send("/undo")
    assert chat.send("hi") == ""
    assert chat.contents == ["hi", "ho"]


def test_a_reply_that_ends_by_itself_or_where_it_was_asked_to_says_nothing() -> None:
    assert Chat(500).send("count") == ""
    assert Chat(500, sampling=Sampling(max_tokens=2)).send("count") == ""
    exactly = Chat(len("<user>count") + 8)
    assert exactly.send("count") == ""


def test_a_reply_that_the_default_length_cuts_says_how_to_get_more() -> None:
    class Short(FakeEngine):
        def stream(self, prompt, sampling=None):  # type: ignore[no-untyped-def]
            return super().stream(prompt, Sampling(max_tokens=3))

    chat = Chat(500)
    chat.session.engine = Short(plan=FakePlan(context=500), replies={"count": COUNTED})
    assert chat.send("count") == "(the reply was cut at 3 tokens; -n or /set max_tokens allow more)\n"


def test_the_oldest_messages_are_left_out_when_asked_to() -> None:
    chat = Chat(80, shifts=True, system="s")
    for _ in range(2):
        assert chat.send("hi") == ""
    tokens = len("<system>s<user>hi<assistant>ho<user>hi<assistant>ho")
    said = chat.send("hm")
    # A quarter of the context is for the reply.
    assert tokens + len("<user>hm") <= 60
    assert said == ""
    said = chat.send("hi")
    kept = "<system>s<user>hi<assistant>ho<user>hm<assistant>hm<user>hi"
    assert said == f"(context full: the oldest 2 messages left out, now {len(kept)} of 80 tokens)\n"
    assert chat.engine.prompts[-1] == kept
    assert chat.contents == ["s", "hi", "ho", "hm", "hm", "hi", "ho"]


def test_nothing_is_left_out_in_vain() -> None:
    chat = Chat(60, shifts=True)
    chat.send("hi")
    said = chat.send("x" * 60)
    assert "context full: this message would make it 66 of 60 tokens" in said
    assert "send a shorter one, or start with a larger --ctx-size" in said
    assert chat.contents == ["hi", "ho"]


def test_a_message_that_leaves_less_than_the_room_for_a_reply_is_still_sent() -> None:
    chat = Chat(60, shifts=True)
    assert "cut: context full, 60 of 60 tokens; the next message leaves the oldest out" in chat.send("x " * 26)
    chat = Chat(60)
    chat.engine.replies = {"x" * 50: "ok"}
    assert chat.send("x" * 50) == ""


def test_a_file_that_does_not_fit_is_refused_and_not_attached(tmp_path: Path) -> None:
    (tmp_path / "long").write_text("x" * 60)
    (tmp_path / "half").write_text("y" * 30)
    (tmp_path / "huge").write_text("z" * 20_000)
    chat = Chat(60)
    with pytest.raises(FileTrouble, match=r"long does not fit: it makes 67 of 60 tokens; give a shorter text"):
        chat.send(f"/read {tmp_path / 'long'}")
    with pytest.raises(FileTrouble, match=r"huge has 19.5 KiB, too much for a context of 60 tokens"):
        chat.send(f"/read {tmp_path / 'huge'}")
    assert "Read 30 characters" in chat.send(f"/read {tmp_path / 'half'}")
    with pytest.raises(FileTrouble, match=r"half does not fit"):
        chat.send(f"/read {tmp_path / 'half'}")
    assert chat.session.attached == ["y" * 30]
    assert chat.send("hi") == ""
    with pytest.raises(FileTrouble, match=r"with it the conversation has .* make room with /undo or /clear"):
        chat.send(f"/read {tmp_path / 'half'}")
    chat.send("/clear")
    assert chat.send(f"/read {tmp_path / 'half'}")


def test_a_file_that_fits_alone_is_attached_where_messages_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "half").write_text("y" * 25)
    chat = Chat(60, shifts=True)
    chat.send("x" * 20)
    chat.send(f"/read {tmp_path / 'half'}")
    assert "the oldest 2 messages left out" in chat.send("hi")
    assert chat.contents[0] == "y" * 25 + "\nhi"


def test_a_text_far_beyond_the_context_is_not_tokenized() -> None:
    chat = Chat(10)
    assert "this message would make it more than 10 of 10 tokens" in chat.send("x" * 10_000)
