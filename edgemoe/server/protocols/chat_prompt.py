"""The conversation of a request in OpenAI's shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgemoe.checkpoint.chat_template import ChatPrompt
from edgemoe.server.protocols import fields


def chat_prompt(body: Mapping[str, Any]) -> ChatPrompt:
    """The conversation of `body`, with its tools and the variables of the template. Raises FieldError."""
    messages = [_as_known(message) for message in fields.messages(body.get("messages"))]
    return ChatPrompt(messages, fields.template_kwargs(body))


def _as_known(message: dict[str, Any]) -> dict[str, Any]:
    """The message with the role that templates know: OpenAI calls a newer model's system prompt the developer's."""
    return message | {"role": "system"} if message["role"] == "developer" else message
