from __future__ import annotations

import pytest

from edgemoe.cli.chat.message_input import Message, MessageInput


class Keyboard:
    """Chunks of lines: those of a chunk arrive together, and the first one after the prompt is shown.

    `ahead` lines are there before the first prompt is.
    """

    def __init__(self, *chunks: str, ahead: int = 0) -> None:
        self._chunks = [chunk.split("|") for chunk in chunks]
        self._ahead = ahead
        self._begun = False
        self.prompts = ""

    def read_line(self, prompt: str) -> str:
        self.prompts += prompt
        if not self._chunks:
            raise EOFError
        self._begun = True
        self._ahead -= 1
        line = self._chunks[0].pop(0)
        if not self._chunks[0]:
            del self._chunks[0]
            self._begun = False
        return line.replace("\\n", "\n")

    def pending(self, seconds: float) -> bool:
        return self._ahead > 0 or (self._begun and bool(self._chunks))


def read(*chunks: str, ahead: int = 0) -> tuple[list[Message], str]:
    """All messages of what is typed, and the prompts that were shown."""
    keyboard = Keyboard(*chunks, ahead=ahead)
    source, messages = MessageInput(keyboard.read_line, keyboard.pending), []
    try:
        while True:
            messages.append(source.read())
    except EOFError:
        return messages, keyboard.prompts


@pytest.mark.parametrize(
    ("chunks", "messages"),
    [
        (["  one  ", "/two"], [("one", False), ("/two", False)]),
        (["one|two|three", "four"], [("one\ntwo\nthree", True), ("four", False)]),
        (["one|  two|"], [("one\n  two", True)]),
        (["/usr/bin|two"], [("/usr/bin\ntwo", True)]),
        (["/set top_k 4|/show", "x"], [("/set top_k 4", False), ("/show", False), ("x", False)]),
        (["one\\ntwo\\n"], [("one\ntwo", True)]),
        (["one\\n"], [("one", False)]),
        ([""], [("", False)]),
        (['"""one', '/two"""'], [("one\n/two", True)]),
        (['"""one|two"""'], [("one\ntwo", True)]),
        (['"""a\\nb', 'c"""'], [("a\nb\nc", True)]),
        (["a|", "b"], [("a", False), ("b", False)]),
    ],
)
def test_messages(chunks: list[str], messages: list[tuple[str, bool]]) -> None:
    assert [tuple(message) for message in read(*chunks)[0]] == messages


def test_what_was_typed_before_the_prompt_is_a_message_a_line() -> None:
    messages, _ = read("one|two", "three|four", ahead=2)
    assert [message.text for message in messages] == ["one", "two", "three\nfour"]


def test_further_lines_have_a_prompt_of_their_own() -> None:
    assert read("one|two", '"""', 'x"""')[1] == ">>> ... >>> ... >>> "
