"""The conversation of a request in OpenAI's shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgemoe.checkpoint.chat_template import ChatPrompt
from edgemoe.server.protocols import fields


def chat_prompt(body: Mapping[str, Any]) -> ChatPrompt:
    """The conversation of `body`, with its tools and the variables of the template. Raises FieldError."""
    return ChatPrompt(fields.messages(body.get("messages")), fields.template_kwargs(body))
