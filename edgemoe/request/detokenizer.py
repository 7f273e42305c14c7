"""Streams text from tokens: no partial character, no partial stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""The decoder's text for bytes that are not a whole character."""
MAX_HELD_TOKENS = 8
"""Cap on the tokens held back for an unfinished character, which has at most 4 bytes."""


class Detokenizer:
    """Decodes a reply token by token. The pieces concatenated equal the decoding of all tokens at once."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._context = 0
        self._given = 0
        self._sent = 0

    def push(self, token: int) -> str:
        """Appends `token` and returns the new text; empty while a character is unfinished."""
        self._ids.append(token)
        # Decoding starts before the new tokens, since decoders treat the first token differently.
        text = self._decode(self._ids[self._context :])
        if text.endswith(UNFINISHED):
            if len(self._ids) - self._given <= MAX_HELD_TOKENS:
                return ""
            # Too many bytes for one character, but the next token may still complete the last one.
            return self._release(text, max(self._sent, len(text) - 1))
        piece = self._release(text, len(text))
        self._context, self._given = self._given, len(self._ids)
        self._sent = len(self._decode(self._ids[self._context :]))
        return piece

    def finish(self) -> str:
        """The rest of the text at the end of the reply, with the decoder's text for unfinished characters."""
        text = self._decode(self._ids[self._context :])
        return self._release(text, len(text))

    def _release(self, text: str, end: int) -> str:
        piece, self._sent = text[self._sent : end], end
        return piece

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


class NoText:
    """The detokenizer of a checkpoint without a tokenizer: every token's text is empty."""

    def push(self, token: int) -> str:
        """Always empty."""
        return ""

    def finish(self) -> str:
        """Always empty."""
        return ""


class StopTexts:
    """Cuts a streamed text at the first stop text, and holds back a possible beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.found = False
        """Whether a stop text was found."""

    def push(self, text: str) -> str:
        """Appends `text` and returns the text that can be released; empty once a stop text was found."""
        if self.found:
            return ""
        self._held += text
        starts = [at for at in map(self._held.find, self._stops) if at >= 0]
        if starts:
            self.found = True
            return self._release(min(starts))
        return self._release(len(self._held) - self._possible_start())

    def finish(self) -> str:
        """The text held back, at the end of the reply."""
        return "" if self.found else self._release(len(self._held))

    def _possible_start(self) -> int:
        """The length of the longest end of the held text that begins a stop text."""
        longest = max(map(len, self._stops), default=1) - 1
        for count in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-count:]) for stop in self._stops):
                return count
        return 0

    def _release(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        return text
