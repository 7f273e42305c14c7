"""Streams text from tokens: no partial character, no partial stop text."""

from __future__ import annotations

import os
from collections.abc import Sequence, Set

from edgemoe.request.token_texts import TokenTexts

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""The decoder's text for bytes that are not a whole character."""
CONTEXT = 8
"""Tokens with text that are decoded again before new ones: decoders treat the first token of a text differently."""


class Detokenizer:
    """Decodes a reply token by token.

    The text of the prompt and the pieces concatenated equal the decoding of the prompt's and the reply's tokens. Where
    the prompt ends inside of a character, the first piece has the whole character.
    """

    def __init__(self, texts: TokenTexts, prompt: Sequence[int] = (), *, shown: Set[int] = frozenset()) -> None:
        """Special tokens have no text, except for those in `shown`."""
        self._texts = texts
        self._shown = shown
        self._ids = self._end_of(prompt)
        self._sent = 0
        self._before: str | None = self._decode(self._ids)
        """The text of the prompt, until there is other text after it."""

    def push(self, token: int) -> str:
        """Appends `token` and returns the new text; empty while a character is unfinished."""
        self._ids.append(token)
        if not self._has_text(token):
            return ""
        if token in self._texts.bytes:
            # One more byte may make the whole run invalid.
            return ""
        text = self._decode(self._ids)
        piece = self._release(text, len(text) - text.endswith(UNFINISHED))
        if len(self._ids) > 2 * CONTEXT and self._before is None:
            self._shorten(len(text))
        return piece

    def finish(self) -> str:
        """The rest of the text at the end of the reply, with the decoder's text for unfinished characters."""
        text = self._decode(self._ids)
        return self._release(text, len(text))

    def _release(self, text: str, end: int) -> str:
        if self._before is not None:
            same = os.path.commonprefix([self._before, text[:end]])
            if len(same) == end:
                return ""
            self._before, self._sent = None, len(same)
        piece, self._sent = text[self._sent : end], max(self._sent, end)
        return piece

    def _end_of(self, prompt: Sequence[int]) -> list[int]:
        """The last tokens of the prompt that have text, from one that is no byte in the middle of a run."""
        kept: list[int] = []
        shown = 0
        for token in reversed(prompt):
            kept.append(token)
            shown += self._has_text(token)
            if shown >= CONTEXT and token not in self._texts.bytes and self._decode(kept[::-1]).strip():
                break
        return kept[::-1]

    def _shorten(self, length: int) -> None:
        """Forgets all but the last tokens, of a text of `length` characters."""
        ids = self._end_of(self._ids)
        if len(ids) < len(self._ids):
            self._ids = ids
            self._sent += len(self._decode(ids)) - length

    def _has_text(self, token: int) -> bool:
        return self._texts.has_text(token, shown=self._shown)

    def _decode(self, ids: Sequence[int]) -> str:
        return self._texts.decode(ids, shown=self._shown)


def begun(text: str, marks: Sequence[str]) -> int:
    """The length of the longest end of `text` that is the beginning of one of `marks`, and not the whole of it."""
    longest = max(map(len, marks), default=1) - 1
    for count in range(min(longest, len(text)), 0, -1):
        if any(mark.startswith(text[-count:]) for mark in marks):
            return count
    return 0


class StopTexts:
    """Cuts a streamed text at the first stop text, and holds back a possible beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.found = False
        """Whether a stop text was found."""
        self.match = ""
        """The one that was found first in the text; the longest of several there."""

    def push(self, text: str) -> str:
        """Appends `text` and returns the text that can be released; empty once a stop text was found."""
        if self.found:
            return ""
        self._held += text
        starts = [at for at in map(self._held.find, self._stops) if at >= 0]
        if starts:
            self.found = True
            first = min(starts)
            self.match = max((stop for stop in self._stops if self._held.startswith(stop, first)), key=len)
            return self._release(first)
        return self._release(len(self._held) - begun(self._held, self._stops))

    def finish(self) -> str:
        """The text held back, at the end of the reply."""
        return "" if self.found else self._release(len(self._held))

    def _release(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        return text
