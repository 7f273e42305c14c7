from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from edgemoe.cli.chat.conversation import Conversation, ConversationError
from edgemoe.cli.exits import FileTrouble

SYSTEM = {"role": "system", "content": "Be brief."}


def exchange(*texts: str, system: str | None = None) -> Conversation:
    """A conversation in which user and model take turns."""
    conversation = Conversation(system)
    for index, text in enumerate(texts):
        (conversation.reply if index % 2 else conversation.say)(text)
    return conversation


def contents(conversation: Conversation) -> list[str]:
    return [message["content"] for message in conversation.messages]


def test_messages_are_what_a_model_is_given() -> None:
    assert exchange("Hi", "Hello", system="Be brief.").messages == [
        SYSTEM,
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
    ]
    assert exchange("Hi").messages == [{"role": "user", "content": "Hi"}]


def test_changing_what_was_given_out_changes_nothing() -> None:
    conversation = exchange("Hi")
    conversation.messages[0]["content"] = "changed"
    conversation.messages.clear()
    assert contents(conversation) == ["Hi"]


def test_undo_takes_back_a_message_with_its_reply() -> None:
    conversation = exchange("a", "b", "c", "d", "e", system="s")
    assert conversation.undo() == "e"
    assert conversation.undo() == "c"
    assert contents(conversation) == ["s", "a", "b"]
    assert conversation.undo() == "a"
    with pytest.raises(ConversationError, match="no message to take back"):
        conversation.undo()
    assert contents(conversation) == ["s"]


def test_a_reply_can_be_taken_back_alone() -> None:
    conversation = exchange("a", "b")
    assert conversation.take_reply() == {"role": "assistant", "content": "b"}
    assert conversation.take_reply() is None
    assert contents(conversation) == ["a"]
    with pytest.raises(ConversationError, match="no message to reply to"):
        Conversation("s").take_reply()


def test_clear_keeps_the_system_prompt() -> None:
    conversation = exchange("a", "b", system="s")
    conversation.clear()
    assert contents(conversation) == ["s"]


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_what_is_saved_can_be_loaded(tmp_path: Path, system: str | None) -> None:
    path = str(tmp_path / "talk.json")
    saved = exchange("é ☕", "b\n", system=system)
    saved.save(path)
    loaded = exchange("other", system="other")
    loaded.load(path)
    assert loaded.messages == saved.messages
    assert loaded.system == system
    assert os.listdir(tmp_path) == ["talk.json"]


def test_nothing_is_left_of_what_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(FileTrouble, match="cannot write"):
        exchange("half of a character: \udc80").save(str(tmp_path / "talk.json"))
    assert os.listdir(tmp_path) == []


def test_an_empty_conversation_can_be_saved(tmp_path: Path) -> None:
    path = str(tmp_path / "talk.json")
    Conversation().save(path)
    loaded = exchange("a")
    loaded.load(path)
    assert loaded.messages == []


def test_saving_replaces_a_saved_conversation_and_nothing_else(tmp_path: Path) -> None:
    talk, notes = tmp_path / "talk.json", tmp_path / "notes.txt"
    exchange("a").save(str(talk))
    exchange("b").save(str(talk))
    assert json.loads(talk.read_text())["messages"] == [{"role": "user", "content": "b"}]
    notes.write_text("mine")
    with pytest.raises(FileTrouble, match=r"notes.txt is there and is no saved conversation; give another name"):
        exchange("a").save(str(notes))
    assert notes.read_text() == "mine"


def test_a_pipe_is_not_waited_for_and_stays(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(FileTrouble, match="pipe is there and is no saved conversation"):
        exchange("a").save(str(pipe))
    assert pipe.is_fifo()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("missing/talk.json", "no such file or directory"),
        ("x" * 300, "file name too long"),
        ("x" * 255, "file name too long"),
        ("a\0b", "embedded null byte"),
    ],
)
def test_saving_where_it_is_not_possible(tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(FileTrouble, match=f"cannot write .*{said}"):
        exchange("a").save(str(tmp_path / name))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is no JSON text"),
        ("[]", "must be an object with messages"),
        ('{"messages": 3}', "must be an object with messages"),
        ('{"messages": [{"role": "user"}]}', "content must be a text"),
        ('{"messages": [{"role": "user", "content": "a", "nme": "b"}]}', "unknown field nme"),
    ],
)
def test_loading_what_is_no_conversation_changes_nothing(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "talk.json").write_text(text)
    conversation = exchange("a", system="s")
    with pytest.raises(FileTrouble, match=said):
        conversation.load(str(tmp_path / "talk.json"))
    assert contents(conversation) == ["s", "a"]


def test_loading_what_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(FileTrouble, match="cannot read .*no such file"):
        Conversation().load(str(tmp_path / "missing"))
    (tmp_path / "bytes").write_bytes(b"\xff")
    with pytest.raises(FileTrouble, match="bytes is not UTF-8 text"):
        Conversation().load(str(tmp_path / "bytes"))
