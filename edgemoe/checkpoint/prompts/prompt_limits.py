"""How many tokens a prompt may have."""

from __future__ import annotations

from edgemoe.errors import RequestError


def check_room(tokens: int, context: int) -> None:
    """Raises RequestError unless a prompt of `tokens` tokens leaves room for a reply in a context of `context`."""
    if tokens >= context:
        raise RequestError(
            f"the prompt has {tokens} tokens and the context {context}, reply included: "
            "shorten the prompt, or raise context="
        )
