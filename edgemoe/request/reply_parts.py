"""The parts of a reply to a conversation: what the user is told, and the reasoning before it.

Families mark them by special tokens or by texts. A span of reasoning stands between two markers, as in
`<think>...</think>`. In harmony, gpt-oss' format, a reply is several messages, each with a channel of its own.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence, Set
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from edgemoe.request.call_readers import Call, Tools, whole_json
from edgemoe.request.detokenizer import Detokenizer, begun
from edgemoe.request.token_texts import TokenTexts
from edgemoe.request.tool_calls import tool_call
from edgemoe.results import ToolCall

SPANS = (
    (r"<((?:[a-z]+:)?(?:think|thinking|thought|thoughts|reason|reasoning))>", "</{}>"),
    (r"\[(THINK)\]", "[/{}]"),
    (r"<\|START_(THINKING)\|>", "<|END_{}|>"),
    (r"<\|begin_of_(thought|thinking)\|>", "<|end_of_{}|>"),
    (r"<\|(think|thinking)\|>", "<|/{}|>"),
)
"""What opens a span of reasoning, as a regular expression, and what closes it."""
HARMONY = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>")
FINAL = "final"
"""The channel of harmony that the user is told."""
CHANNELS = (FINAL, "analysis", "commentary")
RECIPIENT = re.compile(r"\bto=functions\.([\w.:-]+)")
"""A function that a message in harmony is for."""


class Piece(NamedTuple):
    """New text of a reply, by its part."""

    content: str = ""
    reasoning: str = ""
    reasons: bool = False
    """Whether the token that it came with is the reasoning's, as its markers are."""

    def joined(self, more: Piece) -> Piece:
        """This text and `more` after it."""
        return Piece(self.content + more.content, self.reasoning + more.reasoning, self.reasons or more.reasons)


@dataclass(frozen=True)
class ReplyFormat:
    """How the replies of one model mark their parts."""

    harmony: bool = False
    span: tuple[str, str] | None = None
    """What opens and closes a span of reasoning."""

    @classmethod
    def of(cls, texts: TokenTexts, template: str) -> ReplyFormat:
        """The format by the tokens of a tokenizer and its chat template."""
        if all(texts.id_of(marker) is not None for marker in HARMONY):
            return cls(harmony=True)
        known = "\n".join([*texts.added, template])
        for opening, closing in SPANS:
            for match in re.finditer(opening, known):
                end = closing.format(match[1])
                # A template that opens a span leaves it to the model to close it, maybe in several tokens.
                if end in known or match[0] in template:
                    return cls(span=(match[0], end))
        return cls()

    @property
    def has_marks(self) -> bool:
        """Whether replies may have more than one part."""
        return self.harmony or self.span is not None

    def parts(
        self,
        texts: TokenTexts,
        prompt: Sequence[int],
        opening: Sequence[int],
        *,
        one_span: bool = False,
        shown: Set[int] = frozenset(),
        tools: Tools | None = None,
    ) -> ReplyParts:
        """The parts of a reply to `prompt`, which ends with `opening`: what the template begins the reply with.

        With `one_span` there is no reasoning after the text has begun, whatever the text has. Special tokens
        `shown` have their text; in harmony, whose messages to `tools` are calls, none has.
        """
        if self.harmony:
            return HarmonyParts(texts, opening, tools or {})
        if self.span is not None:
            return SpanParts(texts, prompt, self.span, opening, one_span=one_span, shown=shown)
        return OnePart(texts, prompt, shown=shown)


class ReplyParts(ABC):
    """Takes the tokens of a reply and gives the text of its parts. No partial character is ever given."""

    calls: tuple[ToolCall, ...] = ()
    """The calls of tools so far, where they are messages of their own."""

    @abstractmethod
    def push(self, token: int) -> Piece:
        """Appends `token`; returns the new text."""

    @abstractmethod
    def finish(self) -> Piece:
        """The rest of the text at the end of the reply."""


class OnePart(ReplyParts):
    """A reply that is all content."""

    def __init__(
        self, texts: TokenTexts, prompt: Sequence[int], *, special: bool = False, shown: Set[int] = frozenset()
    ) -> None:
        """`special` keeps the texts of special tokens, or `shown` those of some."""
        self._detokenizer = Detokenizer(texts, prompt, shown=texts.special if special else shown)

    def push(self, token: int) -> Piece:
        """See the base class."""
        return Piece(self._detokenizer.push(token))

    def finish(self) -> Piece:
        """See the base class."""
        return Piece(self._detokenizer.finish())


class NoParts(ReplyParts):
    """The reply of a checkpoint without a tokenizer: it has no text."""

    def push(self, token: int) -> Piece:
        """See the base class."""
        return Piece()

    def finish(self) -> Piece:
        """See the base class."""
        return Piece()


def span_at(texts: TokenTexts, span: tuple[str, str], opening: Sequence[int]) -> tuple[bool, bool]:
    """Whether `opening`, the end of a prompt, leaves `span` open, and whether one has ended in it with none open."""
    before = texts.decode(opening, shown=texts.special)
    is_open = before.rfind(span[0]) > before.rfind(span[1])
    return is_open, span[1] in before and not is_open


class SpanParts(ReplyParts):
    """A reply with spans of reasoning. White space around the text of a span belongs to neither part."""

    def __init__(
        self,
        texts: TokenTexts,
        prompt: Sequence[int],
        span: tuple[str, str],
        opening: Sequence[int],
        *,
        one_span: bool = False,
        shown: Set[int] = frozenset(),
    ) -> None:
        """`opening` is the end of the prompt, in which a span may have been opened. See `ReplyFormat.parts`."""
        # Markers are looked for in the text, since they are tokens in some families and texts in others.
        markers = frozenset(token for token in map(texts.id_of, span) if token is not None)
        self._detokenizer = Detokenizer(texts, prompt, shown=markers | shown)
        self._span = span
        self._reasons, self._is_over = span_at(texts, span, opening)
        """Whether a span is open, and whether one has ended."""
        self._trims = self._reasons
        """Whether white space that comes next is left out."""
        self._one_span = one_span
        self._held = ""

    def push(self, token: int) -> Piece:
        """See the base class."""
        return self._taken(self._detokenizer.push(token), last=False)

    def finish(self) -> Piece:
        """See the base class."""
        return self._taken(self._detokenizer.finish(), last=True)

    def _taken(self, text: str, *, last: bool) -> Piece:
        self._held += text
        content = reasoning = ""
        reasoned = self._reasons
        while True:
            before, found, after = self._held.partition(self._span[self._reasons])
            ends = bool(found) or last
            ready = before if ends else self._ready()
            if self._one_span and not self._reasons and (self._is_over or ready.strip()):
                # A marker is text from here on.
                self._is_over = True
                ready, found = self._held, ""
            given = self._trimmed(ready, ends=ends)
            content, reasoning = (content, reasoning + given) if self._reasons else (content + given, reasoning)
            if not found:
                self._held = self._held[len(ready) :]
                return Piece(content, reasoning, reasoned or self._reasons)
            self._is_over = self._reasons
            self._held, self._reasons, self._trims = after, not self._reasons, True

    def _trimmed(self, text: str, *, ends: bool) -> str:
        if self._trims:
            text = text.lstrip()
            self._trims = not text
        return text.rstrip() if ends and self._reasons else text

    def _ready(self) -> str:
        """The held text without the beginning of a marker at its end, and in reasoning without white space there."""
        held = self._held[: len(self._held) - begun(self._held, [self._span[self._reasons]])]
        return held.rstrip() if self._reasons else held


class HarmonyParts(ReplyParts):
    """A reply in harmony: messages of a header, which names a channel, and a body."""

    def __init__(self, texts: TokenTexts, opening: Sequence[int], tools: Tools = MappingProxyType({})) -> None:
        """`opening` is the end of the prompt: the beginning of the first header.

        A message to one of `tools` is a call, where its body is its arguments, and else content.
        """
        self._texts = texts
        self._tools = tools
        self._tool = ""
        """The tool that the message is for; empty where it is for none."""
        self._asked = ""
        """What the body of a message to a tool has so far."""
        self._start, self._channel, self._message, self._end = (texts.id_of(marker) for marker in HARMONY)
        self._header: list[int] | None = []
        """The tokens of the header that is being written; None in a body."""
        self._marked = False
        """Whether the header has a mark before the channel's name."""
        self._body = Detokenizer(texts)
        self._is_content = True
        for token in opening:
            self.push(token)
        if not self._marked and self._header is not None:
            # The role.
            self._header = []
        self._told = False
        """Whether the reply has a body already."""

    def push(self, token: int) -> Piece:
        """See the base class."""
        if token in (self._start, self._end):
            piece = self._rest()
            self._header, self._marked, self._tool = [], False, ""
            return piece
        if token == self._message:
            self._open()
        elif self._header is None:
            return self._piece(self._body.push(token))
        elif token == self._channel:
            # The recipient may stand behind the role as well.
            self._tool = self._recipient(self._header)
            self._header, self._marked = [], True
        else:
            self._header.append(token)
            # Some models leave the marks out: a channel's name, and its text right after it.
            if not self._marked and self._texts.decode(self._header).strip() in CHANNELS:
                self._marked = True
                self._open()
        return Piece()

    def finish(self) -> Piece:
        """See the base class. A header without a body is given where there is nothing else."""
        if self._header is None or self._told:
            return self._rest()
        return Piece(self._texts.decode(self._header).strip())

    def _open(self) -> None:
        """Begins the body of the header."""
        if self._header is not None:
            # A special token, such as the one before the kind of the body, ends the channel's name.
            words = self._texts.decode(self._header, shown=self._texts.special).replace("<|", " <|").split()
            # What is addressed to a tool is not for the user, whatever its channel.
            self._is_content = not self._marked or words[:1] in ([], [FINAL])
            self._tool = self._recipient(self._header) or self._tool
            self._header, self._body, self._told = None, Detokenizer(self._texts), True

    def _recipient(self, header: Sequence[int]) -> str:
        """The tool that a header addresses; empty where it is for none of `tools`."""
        found = RECIPIENT.search(self._texts.decode(header, shown=self._texts.special))
        return found[1] if found is not None and found[1] in self._tools else ""

    def _rest(self) -> Piece:
        if self._header is not None:
            return Piece()
        piece = self._piece(self._body.finish())
        if not self._tool:
            return piece
        asked, self._asked = self._asked, ""
        found = whole_json(asked.strip() or "{}")
        if found is None or not isinstance(found[0], dict):
            return Piece(asked)
        self.calls += (tool_call(Call(self._tool, found[0])),)
        return Piece()

    def _piece(self, text: str) -> Piece:
        if self._tool:
            self._asked += text
            return Piece()
        return Piece(text) if self._is_content else Piece(reasoning=text, reasons=True)
