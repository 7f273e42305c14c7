"""The text of one reply: its parts, cut at the first stop text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from functools import cached_property
from typing import Any

from edgemoe.checkpoint.chat_template import ChatPrompt, ChatTemplate
from edgemoe.checkpoint.prompts.chat_messages import chosen_tools
from edgemoe.errors import RequestError
from edgemoe.request.call_formats import HARMONY_CALL, CallFormat, call_format, shown_marks
from edgemoe.request.constraint import Constraint, Constraints
from edgemoe.request.detokenizer import StopTexts
from edgemoe.request.reply_grammar import call_rules, reply_grammar
from edgemoe.request.reply_parts import NoParts, OnePart, Piece, ReplyFormat, ReplyParts
from edgemoe.request.token_texts import TokenTexts
from edgemoe.request.tool_calls import CallText, parameters_of
from edgemoe.response_format import check_schema, schema_of
from edgemoe.results import ToolCall
from edgemoe.sampling import ResolvedSampling

CALLED = "<|call|>"
"""What ends a call in harmony."""


class ReplyText:
    """Takes the tokens of a reply and gives the text that may be shown."""

    def __init__(
        self,
        texts: TokenTexts | None,
        parts: ReplyParts | None,
        stops: Sequence[str],
        ends: Set[int] = frozenset(),
        constraint: Constraint | None = None,
        calls: CallText | None = None,
    ) -> None:
        """`texts` and `parts` are None for a checkpoint without a tokenizer: its replies have no text.

        `ends` are more tokens that end the reply; `constraint` is on its tokens, and `calls` reads calls of tools in
        its content, both this reply's own.
        """
        self.constraint = constraint
        """What the reply must follow; None for any text. The request feeds it."""
        self._texts = texts
        self._parts = parts or NoParts()
        self._stops = StopTexts(stops)
        self._calls = calls
        self.calls: tuple[ToolCall, ...] = ()
        """The calls of tools in the reply, once it is finished."""
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
        return self._without_calls(self._parts.push(token))

    def finish(self) -> Piece:
        """The rest of the text, at the end of the reply. `calls` has the calls of tools then."""
        piece = self._without_calls(self._parts.finish())
        rest, calls = self._calls.finish() if self._calls is not None else ("", ())
        content = piece.content + self._stops.push(rest) + self._stops.finish()
        self.calls = () if self.stopped else self._parts.calls + calls
        return piece._replace(content=content)

    def _without_calls(self, piece: Piece) -> Piece:
        content = self._calls.push(piece.content) if self._calls is not None else piece.content
        return piece._replace(content=self._stops.push(content))

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
        offered, wanted = chosen_tools(chat.tools, chat.tool_choice) if chat is not None else ([], [])
        opening = self._template.opening(chat) if chat is not None and self._format.has_marks else []
        form = self._call_format if offered else None
        constraint = self._constraint(settings, offered, wanted, opening, chat)
        shown = shown_marks(form, texts) if form is not None else frozenset[int]()
        tools = parameters_of(offered)
        if chat is not None and settings.skip_special_tokens:
            parts = self._format.parts(
                texts, prompt, opening, one_span=constraint is not None, shown=shown, tools=tools
            )
        else:
            parts = OnePart(texts, prompt, special=not settings.skip_special_tokens)
        ends = self._turn_ends if chat is not None and not settings.ignore_eos else frozenset[int]()
        if offered and self._format.harmony and not settings.ignore_eos:
            ends |= {token for token in [texts.id_of(CALLED)] if token is not None}
        calls = CallText(form, tools) if form is not None and not self._format.harmony else None
        return ReplyText(texts, parts, settings.stop, ends, constraint, calls)

    def _constraint(
        self,
        settings: ResolvedSampling,
        offered: Sequence[Mapping[str, Any]],
        wanted: Sequence[Mapping[str, Any]],
        opening: Sequence[int],
        chat: ChatPrompt | None,
    ) -> Constraint | None:
        """What the reply to `chat`, or to a plain prompt, must follow: one of the tools `wanted`, or a form."""
        asked = settings.response_format
        if asked is None and not wanted:
            return None
        assert self._texts is not None
        assert self._constraints is not None
        rules: list[str] = []
        if offered:
            if not self._call_format.written:
                raise RequestError(
                    "this model does not write calls of tools as JSON, so that neither a call nor another form can be "
                    'asked of a reply with tools: leave out response_format, and tool_choice other than "auto"'
                )
            for tool in wanted or offered:
                check_schema(tool["function"].get("parameters") or {}, f"the tool {tool['function']['name']}")
            rules = call_rules(wanted or offered, self._call_format, self._texts)
        answer = schema_of(asked) if asked is not None and not wanted else None
        form = self._format if chat is not None else ReplyFormat()
        return self._constraints.new(reply_grammar(answer, rules, form, self._texts, opening))

    @cached_property
    def _call_format(self) -> CallFormat:
        """How the model writes calls of tools. Raises RequestError where that is not known."""
        assert self._texts is not None
        found = HARMONY_CALL if self._format.harmony else call_format(self._texts, self._template.source)
        if found is None:
            raise RequestError("this model writes calls of tools in a form that is not read: leave tools out")
        return found

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
