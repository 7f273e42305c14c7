"""What a conversation consists of, checked before a template sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgemoe.errors import RequestError
from edgemoe.values import check_text, shown

MAX_DEPTH = 64
"""Levels of lists and mappings inside of a message or a variable."""


def check_messages(messages: Any) -> None:
    """Raises RequestError unless `messages` are a sequence of at least one mapping, of texts that are Unicode."""
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes | bytearray):
        raise RequestError(
            f"a conversation must be a list of messages, each with a role and a content, not {shown(messages)}"
        )
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not all(isinstance(key, str) for key in message):
            raise RequestError(
                f"message {number} of a conversation must be a mapping with a role and a content, not {shown(message)}"
            )
        _check_value(dict(message), f"message {number} of a conversation")
    if not messages:
        raise RequestError("the conversation is empty: give at least one message")


def check_variables(variables: Any) -> None:
    """Raises RequestError unless `variables` of a chat template are a mapping by name."""
    if not isinstance(variables, Mapping) or not all(isinstance(name, str) for name in variables):
        raise RequestError(f"template_kwargs must be values by the names of variables, not {shown(variables)}")
    _check_value(dict(variables), "template_kwargs")


def _check_value(value: Any, what: str, depth: int = 0) -> None:
    if depth > MAX_DEPTH:
        raise RequestError(
            f"{what} has more than {MAX_DEPTH} lists or mappings inside of one another: give a flatter one"
        )
    if isinstance(value, str):
        check_text(value, what)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            _check_value(key, what, depth + 1)
            _check_value(inner, what, depth + 1)
    elif isinstance(value, list | tuple):
        for inner in value:
            _check_value(inner, what, depth + 1)
