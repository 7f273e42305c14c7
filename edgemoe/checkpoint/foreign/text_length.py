"""Refuses a text that is longer than the context before all of it is tokenized, which takes 200 bytes a character."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from edgemoe.errors import RequestError

SMALL_TEXT = 1 << 16
"""Characters of a text that is tokenized as a whole, however small the context."""
CHARACTERS_PER_TOKEN = 16
"""Of the first part that is tokenized: so many times the context. Most texts have three to five."""
NEXT_PART = 4
"""How many times as long the next part is, which begins with the same characters."""
SLACK = 256
"""Tokens that the end of a part may have more than the same characters have in the whole text."""
MAX_TEXT = 1 << 20
"""Characters of any text that may be tokenized, and of longer ones as many as the longest tokens could stand for."""


def check_text_length(
    text: str, context: int | None, tokenizer: Any, encode: Callable[[str], Sequence[int]] | None = None
) -> None:
    """Raises RequestError, with the characters and the limit, for a text that has more tokens than `context`.

    Only a text above 65,536 characters, and 16 times the context, is looked at: its beginning is tokenized, then ever
    larger parts. None for `context` or `tokenizer` checks nothing. `encode` gives the token ids of a text; None is the
    tokenizer's own.
    """
    if context is None or tokenizer is None:
        return
    length = max(SMALL_TEXT, CHARACTERS_PER_TOKEN * context)
    if len(text) <= length:
        return
    mend = "shorten the prompt, or raise context="
    limit = max(MAX_TEXT, context * _longest_token(tokenizer))
    if len(text) > limit:
        raise RequestError(
            f"the prompt has {len(text)} characters, and {context} tokens of context hold {limit} at most: {mend}"
        )
    encode = encode or tokenizer.encode
    while length < len(text):
        tokens = len(encode(text[:length]))
        if tokens > context + SLACK:
            raise RequestError(
                f"the prompt has {len(text)} characters, of which the first {length} are {tokens} tokens, and the "
                f"context holds {context}, reply included: {mend}"
            )
        length *= NEXT_PART


def _longest_token(tokenizer: Any) -> int:
    """Characters of the longest token, as the vocabulary writes it."""
    return max((len(token) for token in tokenizer.get_vocab()), default=1)
