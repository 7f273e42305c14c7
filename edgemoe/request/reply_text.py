"""The text of one reply: its parts, cut at the first stop text."""

from __future__ import annotations

from collections.abc import Sequence, Set
from functools import cached_property
from typing import Any

from edgemoe.checkpoint.chat_template import ChatPrompt, ChatTemplate
from edgemoe.request.detokenizer import StopTexts
from edgemoe.request.reply_parts import NoParts, OnePart, Piece, ReplyFormat, ReplyParts
from edgemoe.request.token_texts import TokenTexts
from edgemoe.sampling import ResolvedSampling


class ReplyText:
    """Takes the tokens of a reply and gives the text that may be shown."""

    def __init__(
        self, texts: TokenTexts | None, parts: ReplyParts | None, stops: Sequence[str], ends: Set[int] = frozenset()
    ) -> None:
        """`texts` and `parts` are None for a checkpoint without a tokenizer: its replies have no text.

        `ends` are more tokens that end the reply.
        """
        self._texts = texts
        self._parts = parts or NoParts()
        self._stops = StopTexts(stops)
        named = {texts.id_of(stop): stop for stop in stops} if texts is not None else {}
        self._named = {end: stop for end, stop in named.items() if end is not None}
        self.ends = frozenset(self._named) | ends
        """Tokens that end the reply by their ids: special ones among the stop texts have no text in it."""

    @property
    def stopped(self) -> bool:
        """Whether a stop text was found. Only what the user is told is searched."""
        return self._stops.found

    def stop_text(self, token: int) -> str:
        """The stop text that ended the reply, whose last token is `token`; empty where none did."""
        return self._stops.match or self._named.get(token, "")

    def push(self, token: int) -> Piece:
        """Appends `token`; returns the new text, without what may be the beginning of a stop text."""
        piece = self._parts.push(token)
        return Piece(self._stops.push(piece.content), piece.reasoning)

    def finish(self) -> Piece:
        """The rest of the text, at the end of the reply."""
        piece = self._parts.finish()
        return Piece(self._stops.push(piece.content) + self._stops.finish(), piece.reasoning)

    def name(self, token: int) -> str:
        """What a token is called in log-probabilities: its text, or its id without a tokenizer."""
        return self._texts.name(token) if self._texts is not None else str(token)


class ReplyTexts:
    """Makes the texts of a model's replies."""

    def __init__(self, tokenizer: Any, template: ChatTemplate) -> None:
        """`tokenizer` is transformers', None for replies without text."""
        self._tokenizer = tokenizer
        self._template = template
        self._texts = TokenTexts(tokenizer) if tokenizer is not None else None

    def new(self, prompt: Sequence[int], settings: ResolvedSampling, chat: ChatPrompt | None) -> ReplyText:
        """The text of a reply to `prompt`, which is that of the conversation `chat` where there is one."""
        texts = self._texts
        if texts is None:
            return ReplyText(None, None, settings.stop)
        if chat is not None and settings.skip_special_tokens and self._format.has_marks:
            parts = self._format.parts(texts, prompt, self._template.opening(chat))
        else:
            parts = OnePart(texts, prompt, special=not settings.skip_special_tokens)
        ends = self._turn_ends if chat is not None and not settings.ignore_eos else frozenset[int]()
        return ReplyText(texts, parts, settings.stop, ends)

    @cached_property
    def _format(self) -> ReplyFormat:
        assert self._texts is not None
        return ReplyFormat.of(self._texts, self._template.source)

    @cached_property
    def _turn_ends(self) -> frozenset[int]:
        """What closes a turn by the tokenizer and the template, beside what the checkpoint ends replies with."""
        assert self._texts is not None
        ends = {self._tokenizer.eos_token_id}
        if not self._format.harmony:
            # In harmony the end of a message is not the end of the turn.
            ends |= {self._template.turn_end()} & self._texts.special
        return frozenset(ends - {None})
