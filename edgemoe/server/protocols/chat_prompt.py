"""The conversation of a request in OpenAI's shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgemoe.checkpoint.chat_template import ChatPrompt
from edgemoe.checkpoint.prompts.chat_messages import check_chat
from edgemoe.server.protocols import fields


def chat_prompt(body: Mapping[str, Any]) -> ChatPrompt:
    """The conversation of `body`, its tools and the variables of the template. Raises FieldError and RequestError."""
    messages = [_as_known(message) for message in fields.messages(body.get("messages"))]
    tools = fields.tools(body)
    check_chat(messages, **tools)
    return ChatPrompt(messages, fields.template_kwargs(body), **tools)


def _as_known(message: dict[str, Any]) -> dict[str, Any]:
    """The message with the role that templates know: OpenAI calls a newer model's system prompt the developer's."""
    return message | {"role": "system"} if message["role"] == "developer" else message
