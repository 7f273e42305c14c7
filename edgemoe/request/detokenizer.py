"""From tokens to text as they come: never half a character, never part of a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a decoder gives for bytes that are not yet a whole character."""
HELD_TOKENS = 8
"""Tokens held back at most: a character has at most 4 bytes, so more than this is no character to come."""


class Detokenizer:
    """Decodes a reply token by token. The pieces together are the decoding of all tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._context = 0
        self._given = 0
        self._sent = 0

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is unfinished."""
        self._ids.append(token)
        # Decoding starts a little before the new tokens, since a decoder treats a first token apart.
        text = self._decode(self._ids[self._context :])
        if text.endswith(UNFINISHED):
            if len(self._ids) - self._given <= HELD_TOKENS:
                return ""
            # Too many for one character; but what follows may still complete the last of them.
            return self._release(text, max(self._sent, len(text) - 1))
        piece = self._release(text, len(text))
        self._context, self._given = self._given, len(self._ids)
        self._sent = len(self._decode(self._ids[self._context :]))
        return piece

    def finish(self) -> str:
        """What is left at the end, unfinished characters as the decoder shows them."""
        text = self._decode(self._ids[self._context :])
        return self._release(text, len(text))

    def _release(self, text: str, end: int) -> str:
        piece, self._sent = text[self._sent : end], end
        return piece

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


class NoText:
    """Stands in for a detokenizer where the checkpoint has no tokenizer: no token has a text."""

    def push(self, token: int) -> str:
        """Always empty."""
        return ""

    def finish(self) -> str:
        """Always empty."""
        return ""


class StopTexts:
    """Cuts a text at the first of some stop texts, and holds back what may become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that may be given out; after a stop text was found, nothing more."""
        if self.found:
            return ""
        self._held += text
        starts = [at for at in map(self._held.find, self._stops) if at >= 0]
        if starts:
            self.found = True
            return self._release(min(starts))
        return self._release(len(self._held) - self._possible_start())

    def finish(self) -> str:
        """What was held back, once nothing can follow."""
        return "" if self.found else self._release(len(self._held))

    def _possible_start(self) -> int:
        """Characters at the end of the held text that are the beginning of a stop text."""
        longest = max(map(len, self._stops), default=1) - 1
        for count in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-count:]) for stop in self._stops):
                return count
        return 0

    def _release(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        return text
