"""The grammar of a whole reply, in llguidance's form of Lark: the reasoning that may come first, and the text."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from edgemoe.request.reply_parts import FINAL, HARMONY, ReplyFormat
from edgemoe.request.token_texts import TokenTexts

_ANY = r"(.|\n)*"
BODY = "body"
"""The rule for the text, to which `reply_grammar` adds those before it."""
_SPACE = 'space: /[ \\n]{1,2}/'


def reply_grammar(body: str, form: ReplyFormat, texts: TokenTexts, opening: Sequence[int]) -> str:
    """The grammar of a reply whose text has the rule `body`, or several rules of which the first is called `body`.

    `form` says how replies mark their reasoning, and `opening` is the end of the prompt, which the template begins the
    reply with. The reasoning is free, but for the marks.
    """
    if form.harmony:
        before = _harmony(texts, opening)
    elif form.span is not None:
        before = _span(form.span, texts, opening)
    else:
        before = ["start: space? body"]
    return "\n".join(["%llguidance {}", *before, _SPACE, body])


def symbol(text: str, texts: TokenTexts) -> str:
    """A text as Lark has it: by its id where it is an added token, which a text in a grammar never is."""
    token = texts.added.get(text, texts.id_of(text))
    return json.dumps(text) if token is None else f"<[{token}]>"


def _span(span: tuple[str, str], texts: TokenTexts, opening: Sequence[int]) -> list[str]:
    """The rules before the text of a reply that has its reasoning between two markers."""
    begin, end = span
    before = texts.decode(opening, shown=texts.special)
    closing = symbol(end, texts)
    if closing.startswith("<["):
        # Spelt in several tokens it would be taken for the marker, too.
        rules = [f"thought: THOUGHT {closing}", f"THOUGHT: {_without(end)}"]
    else:
        rules = [f"thought[lazy]: /{_ANY}{_escaped(end)}/"]
    if before.rfind(begin) > before.rfind(end):
        return ["start: thought space? body", *rules]
    if end in before or not symbol(begin, texts).startswith("<["):
        return ["start: space? body"]
    return [f"start: ({symbol(begin, texts)} thought)? space? body", *rules]


def _harmony(texts: TokenTexts, opening: Sequence[int]) -> list[str]:
    """The rules before the body of harmony's message to the user."""
    start, channel, message, end = (symbol(mark, texts) for mark in HARMONY)
    if texts.decode(opening, shown=texts.special).endswith(HARMONY[2]):
        # The template has begun a message.
        return ["start: space? body"]
    kind = texts.id_of("<|constrain|>")
    form = f' (" "? <[{kind}]> "json")?' if kind is not None else ""
    return [
        f'start: (analysis {end} {start} "assistant")* {channel} "{FINAL}"{form} {message} space? body',
        f'analysis: {channel} "analysis" {message} THOUGHT',
        f"THOUGHT: /{_ANY}/",
    ]


def _without(text: str) -> str:
    """Any text that does not hold `text`."""
    return f"/{_ANY}/ & ~/{_ANY}{_escaped(text)}{_ANY}/"


def _escaped(text: str) -> str:
    # Not re.escape: some of what it escapes has a meaning of its own in Rust's regular expressions.
    return re.sub(r"([\\.+*?()|\[\]{}^$/])", r"\\\1", text)
