"""The text of one reply: its parts, cut at the first stop text."""

from __future__ import annotations

from collections.abc import Sequence, Set
from functools import cached_property
from typing import Any

from edgemoe.checkpoint.chat_template import ChatPrompt, ChatTemplate
from edgemoe.errors import RequestError
from edgemoe.request.constraint import Constraint, Constraints
from edgemoe.request.detokenizer import StopTexts
from edgemoe.request.reply_grammar import BODY, reply_grammar
from edgemoe.request.reply_parts import NoParts, OnePart, Piece, ReplyFormat, ReplyParts
from edgemoe.request.token_texts import TokenTexts
from edgemoe.response_format import json_rule, schema_of
from edgemoe.sampling import ResolvedSampling


class ReplyText:
    """Takes the tokens of a reply and gives the text that may be shown."""

    def __init__(
        self,
        texts: TokenTexts | None,
        parts: ReplyParts | None,
        stops: Sequence[str],
        ends: Set[int] = frozenset(),
        constraint: Constraint | None = None,
    ) -> None:
        """`texts` and `parts` are None for a checkpoint without a tokenizer: its replies have no text.

        `ends` are more tokens that end the reply; `constraint` is on its tokens, this reply's own.
        """
        self.constraint = constraint
        """What the reply must follow; None for any text. The request feeds it."""
        self._texts = texts
        self._parts = parts or NoParts()
        self._stops = StopTexts(stops)
        named = {texts.id_of(stop) for stop in stops} if texts is not None else set()
        self.ends = frozenset(end for end in named if end is not None) | ends
        """Tokens that end the reply by their ids: special ones among the stop texts have no text in it."""

    @property
    def stopped(self) -> bool:
        """Whether a stop text was found. Only what the user is told is searched."""
        return self._stops.found

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
        self._constraints = Constraints(tokenizer, self._texts) if self._texts is not None else None

    def new(self, prompt: Sequence[int], settings: ResolvedSampling, chat: ChatPrompt | None) -> ReplyText:
        """The text of a reply to `prompt`, which is that of the conversation `chat` where there is one."""
        texts = self._texts
        if texts is None:
            if settings.response_format is not None:
                raise RequestError("response_format needs a tokenizer, and the checkpoint has none: leave it out")
            return ReplyText(None, None, settings.stop)
        constraint = self._constraint(settings, chat)
        if chat is not None and settings.skip_special_tokens and self._format.has_marks:
            opening = self._template.opening(chat)
            parts = self._format.parts(texts, prompt, opening, one_span=constraint is not None)
        else:
            parts = OnePart(texts, prompt, special=not settings.skip_special_tokens)
        ends = self._turn_ends if chat is not None and not settings.ignore_eos else frozenset[int]()
        return ReplyText(texts, parts, settings.stop, ends, constraint)

    def _constraint(self, settings: ResolvedSampling, chat: ChatPrompt | None) -> Constraint | None:
        """What the reply to `chat`, or to a plain prompt, must follow."""
        if settings.response_format is None:
            return None
        assert self._texts is not None
        assert self._constraints is not None
        body = f"{BODY}: {json_rule(schema_of(settings.response_format))}"
        form = self._format if chat is not None else ReplyFormat()
        opening = self._template.opening(chat) if chat is not None and form.has_marks else []
        return self._constraints.new(reply_grammar(body, form, self._texts, opening))

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
