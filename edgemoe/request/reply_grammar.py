"""The grammar of a whole reply, in llguidance's form of Lark: the reasoning that may come first, and the text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from edgemoe.request.call_formats import ARGUMENTS, NAME, CallFormat
from edgemoe.request.reply_parts import FINAL, HARMONY, ReplyFormat, span_at
from edgemoe.request.token_texts import TokenTexts
from edgemoe.response_format import json_rule

HEADER = '%llguidance {"no_forcing": true}'
"""Without forced tokens: where a text is certain, its usual tokens may be a special one, which is no text."""
_ANY = r"(.|\n)*"
_SPACE = "space: /[ \\n]{1,2}/"


def reply_grammar(
    answer: Mapping[str, Any] | None,
    calls: Sequence[str],
    form: ReplyFormat,
    texts: TokenTexts,
    opening: Sequence[int],
) -> str:
    """The grammar of a reply whose text is JSON of the schema `answer`, or one of `calls`, from `call_rules`.

    `form` says how replies mark their reasoning, and `opening` is the end of the prompt, which the template begins the
    reply with. The reasoning is free, but for the marks.
    """
    bodies = [] if answer is None else ["answer"]
    bodies += [f"call_{number}" for number in range(len(calls))]
    if form.harmony:
        rules = _harmony(bodies, texts, opening)
    elif form.span is not None:
        rules = _span(f"({' | '.join(bodies)})", form.span, texts, opening)
    else:
        rules = [f"start: space? ({' | '.join(bodies)})"]
    if answer is not None:
        rules.append(f"answer: {json_rule(answer)}")
    return "\n".join([HEADER, *rules, _SPACE, *calls])


def call_rules(tools: Sequence[Mapping[str, Any]], form: CallFormat, texts: TokenTexts) -> list[str]:
    """The rules for a call of each of `tools` in `form`, of which a call is known piece by piece."""
    rules = []
    for number, tool in enumerate(tools):
        pieces = {NAME: json.dumps(tool["function"]["name"]), ARGUMENTS: f"arguments_{number}"}
        written = [pieces[piece] if piece in pieces else symbol(str(piece), texts) for piece in form.written]
        schema = {"type": "object", **(tool["function"].get("parameters") or {})}
        rules.append(f"call_{number}: {' '.join(written)}\narguments_{number}: {json_rule(schema)}")
    return rules


def symbol(text: str, texts: TokenTexts) -> str:
    """A text as Lark has it: by its id where it is an added token, which a text in a grammar never is."""
    token = texts.added.get(text, texts.id_of(text))
    return json.dumps(text) if token is None else f"<[{token}]>"


def _span(body: str, span: tuple[str, str], texts: TokenTexts, opening: Sequence[int]) -> list[str]:
    """The rules for a reply that may have its reasoning between two markers, and then `body`."""
    begin, end = span
    is_open, has_ended = span_at(texts, span, opening)
    closing = symbol(end, texts)
    if closing.startswith("<["):
        # Spelt in several tokens it would be taken for the marker, too.
        rules = [f"thought: THOUGHT {closing}", f"THOUGHT: {_without(end)}"]
    else:
        rules = [f"thought[lazy]: /{_ANY}{_escaped(end)}/"]
    if is_open:
        return [f"start: thought space? {body}", *rules]
    if has_ended or not symbol(begin, texts).startswith("<["):
        return [f"start: space? {body}"]
    return [f"start: ({symbol(begin, texts)} thought)? space? {body}", *rules]


def _harmony(bodies: Sequence[str], texts: TokenTexts, opening: Sequence[int]) -> list[str]:
    """The rules for a reply of messages, of which the last has the answer or is a call."""
    start, channel, message, end = (symbol(mark, texts) for mark in HARMONY)
    if texts.decode(opening, shown=texts.special).endswith(HARMONY[2]):
        # The template has begun a message.
        return ["start: space? answer"]
    kind = texts.id_of("<|constrain|>")
    named = f' (" "? <[{kind}]> "json")?' if kind is not None else ""
    last = {"answer": f'{channel} "{FINAL}"{named} {message} space? answer'}
    return [
        f'start: (analysis {end} {start} "assistant")* ({" | ".join(last.get(body, body) for body in bodies)})',
        f'analysis: {channel} "analysis" {message} THOUGHT',
        f"THOUGHT: /{_ANY}/",
    ]


def _without(text: str) -> str:
    """Any text that does not hold `text`."""
    return f"/{_ANY}/ & ~/{_ANY}{_escaped(text)}{_ANY}/"


def _escaped(text: str) -> str:
    # Not re.escape: some of what it escapes has a meaning of its own in Rust's regular expressions.
    return re.sub(r"([\\.+*?()|\[\]{}^$/])", r"\\\1", text)
