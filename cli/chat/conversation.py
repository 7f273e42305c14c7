"""A conversation: its messages and what can be done with them. It knows no terminal and no model."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgemoe.cli.chat.text_file import place_of, read_text
from edgemoe.cli.exits import FileTrouble, why
from edgemoe.errors import EdgeMoEError
from edgemoe.server.protocols.fields import FieldError
from edgemoe.server.protocols.fields import messages as checked

Message = dict[str, str]


class ConversationError(EdgeMoEError):
    """There is nothing in the conversation that this could be done with."""


class Conversation:
    """Messages in order. The system prompt is kept apart, so that it outlives `clear`."""

    def __init__(self, system: str | None = None) -> None:
        self.system = system
        self._turns: list[Message] = []

    @property
    def messages(self) -> list[Message]:
        """Everything, the system prompt first: what a model is given, and what is saved."""
        return self.messages_without(0)

    def say(self, text: str) -> None:
        """Add what the user says."""
        self._turns.append({"role": "user", "content": text})

    def reply(self, text: str, reasoning: str = "") -> None:
        """Add what the model replies. Its chat template decides whether it reads its reasoning again."""
        kept = {"reasoning_content": reasoning} if reasoning else {}
        self._turns.append({"role": "assistant", "content": text} | kept)

    def clear(self) -> None:
        """Forget every message but the system prompt."""
        self._turns.clear()

    def undo(self) -> str:
        """Take back the user's last message and what followed it; return its text."""
        for index in reversed(range(len(self._turns))):
            if self._turns[index]["role"] == "user":
                text = self._turns[index]["content"]
                del self._turns[index:]
                return text
        raise ConversationError("there is no message to take back yet")

    def kept(self) -> Callable[[], None]:
        """What brings the messages back that are there now."""
        turns = list(self._turns)

        def restore() -> None:
            self._turns = turns

        return restore

    @property
    def turns(self) -> int:
        """How many turns there are. A turn is a user's message and what follows it."""
        return len(self._beginnings()) - 1

    def messages_without(self, turns: int) -> list[Message]:
        """`messages`, but for those of the oldest turns."""
        first = [{"role": "system", "content": self.system}] if self.system is not None else []
        return first + [dict(turn) for turn in self._turns[self._beginnings()[turns] :]]

    def leave_out(self, turns: int) -> int:
        """Forget the oldest turns, the system prompt not; return how many messages that were."""
        count = self._beginnings()[turns]
        del self._turns[:count]
        return count

    def _beginnings(self) -> list[int]:
        """Where each turn begins, and where the next one would; what a user has not begun belongs to the first."""
        asked = [index for index, turn in enumerate(self._turns) if turn["role"] == "user"]
        return [0, *asked[1:], len(self._turns)] if self._turns else [0]

    def take_reply(self) -> Message | None:
        """Take back the last reply, so that another can be given; None when the user spoke last."""
        if not any(turn["role"] == "user" for turn in self._turns):
            raise ConversationError("there is no message to reply to yet")
        if self._turns[-1]["role"] == "user":
            return None
        return self._turns.pop()

    def save(self, path: str) -> None:
        """Write as JSON, whole or not at all. Raises FileTrouble, also for a file that is no saved conversation."""
        target = place_of(path)
        try:
            # A pipe would be waited for, and is nothing to replace.
            if target.exists() and not (target.is_file() and _is_conversation(path)):
                raise FileTrouble(f"{path} is there and is no saved conversation; give another name")
            self._write(target)
        except OSError as error:
            raise FileTrouble(f"cannot write {path}: {why(error)}") from error
        except ValueError as error:  # no name of a file
            raise FileTrouble(f"cannot write {path}: {error}") from error

    def _write(self, target: Path) -> None:
        unfinished = target.with_name(target.name + ".part")
        try:
            unfinished.write_text(json.dumps({"messages": self.messages}, ensure_ascii=False, indent=2) + "\n", "utf-8")
            os.replace(unfinished, target)
        except (OSError, ValueError):  # half a character cannot be written
            with contextlib.suppress(OSError):
                unfinished.unlink()
            raise

    def load(self, path: str) -> None:
        """Become what `save` wrote. Raises FileTrouble and then stays as it was."""
        messages = _read(path)
        self.system = None
        if messages and messages[0]["role"] == "system":
            self.system = messages.pop(0)["content"]
        self._turns = messages


def _is_conversation(path: str) -> bool:
    try:
        _read(path)
    except FileTrouble:
        return False
    return True


def _read(path: str) -> list[Message]:
    try:
        entry: Any = json.loads(read_text(path))
        if not isinstance(entry, dict) or not isinstance(entry.get("messages"), list):
            raise FileTrouble(f"{path} is no saved conversation; it must be an object with messages")
        return list(checked(entry["messages"])) if entry["messages"] else []
    except FieldError as error:
        raise FileTrouble(f"{path} is no saved conversation: {error}") from error
    except (ValueError, RecursionError) as error:
        raise FileTrouble(f"{path} is no JSON text") from error
