"""What a request in another protocol asks for, as the body of an OpenAI chat: one reader then serves all."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from edgemoe.server.protocols import fields

EXTRAS = (
    "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "seed",
    "ignore_eos", "chat_template_kwargs",
)  # fmt: skip
"""Settings of edgemoe's that every protocol takes by these names, beside its own."""


def taken(body: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The fields called `names` that `body` has and that are not null."""
    return {name: body[name] for name in names if body.get(name) is not None}


def objects(name: str, value: Any) -> list[dict[str, Any]]:
    """A list of objects. Raises FieldError."""
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise fields.mistyped(name, "a list of objects", value)
    return value


def joined_text(name: str, value: Any, kinds: Collection[str]) -> str:
    """A text, or the texts of a list of parts of `kinds`. Raises FieldError for other parts."""
    if isinstance(value, str):
        return fields.words(name, value)
    texts = []
    for part in objects(name, value):
        if part.get("type") not in kinds:
            raise fields.FieldError(
                f"{name} has a part of type {str(part.get('type'))[:40]!r}, but only text is served"
            )
        texts.append(fields.words("text", part.get("text")))
    return "".join(texts)


class Conversation:
    """Messages in OpenAI's shape, where an assistant's turn comes in pieces: reasoning, text and calls of tools."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self._turn: dict[str, Any] | None = None
        """The assistant's message that more pieces may join."""

    def say(self, role: str, content: str, **more: Any) -> None:
        """A message of anybody but the assistant."""
        self._turn = None
        self.messages.append({"role": "system" if role == "developer" else role, "content": content, **more})

    def reasoned(self, text: str) -> None:
        """Reasoning of the assistant."""
        turn = self._turn
        if turn is None or turn["content"] or "tool_calls" in turn:
            turn = self._begin()
        turn["reasoning_content"] = turn.get("reasoning_content", "") + text

    def answered(self, text: str) -> None:
        """Text of the assistant."""
        turn = self._turn
        if turn is None or turn["content"] or "tool_calls" in turn:
            turn = self._begin()
        turn["content"] = text

    def called(self, identifier: str, name: str, arguments: str) -> None:
        """A call of a tool by the assistant; `arguments` is JSON."""
        turn = self._turn if self._turn is not None else self._begin()
        call = {"id": identifier, "type": "function", "function": {"name": name, "arguments": arguments}}
        turn.setdefault("tool_calls", []).append(call)

    def _begin(self) -> dict[str, Any]:
        self._turn = {"role": "assistant", "content": ""}
        self.messages.append(self._turn)
        return self._turn
