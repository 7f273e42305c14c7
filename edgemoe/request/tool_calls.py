"""Calls of tools in a reply: they are taken out of its text, once they are whole."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from edgemoe.request.call_formats import CallFormat
from edgemoe.request.call_readers import Call, Tools
from edgemoe.request.detokenizer import begun
from edgemoe.results import ToolCall


def parameters_of(tools: Sequence[Mapping[str, Any]]) -> Tools:
    """The parameters of checked tools, by name."""
    return {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}


def tool_call(call: Call, id_length: int = 0) -> ToolCall:
    """A call as results have it: with its own id, or with a new one of `id_length` characters, where that is not 0."""
    new = uuid.uuid4().hex[:id_length] if id_length else f"call_{uuid.uuid4().hex[:24]}"
    return ToolCall(_whole(call.id) or new, call.name, _whole(json.dumps(call.arguments, ensure_ascii=False)))


def _whole(text: str) -> str:
    """`text` with a replacement character for each half of a character, which the escapes of JSON can give."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


class CallText:
    """Takes the text of a reply, and gives what is not a call of one of the tools.

    What may be a call is held back to the end. What then is none, as it is malformed or of no tool that is offered, is
    text.
    """

    def __init__(self, form: CallFormat, tools: Tools) -> None:
        self._form = form
        self._tools = tools
        self._held = ""
        self._begun = False
        """Whether a call may have begun."""
        self._bare = bool(form.bare)
        """Whether the reply is still so short that a call without a mark may begin."""

    def push(self, text: str) -> str:
        """Appends `text` and returns what is sure to be no part of a call. White space before a call is none."""
        self._held += text
        if self._begun:
            return ""
        if self._bare:
            start = self._held.lstrip()[:1]
            if not start:
                return ""
            self._bare = False
            if start in self._form.bare:
                self._begun = True
                return ""
        begin = self._form.begin
        at = self._held.find(begin) if begin else -1
        self._begun = at >= 0
        ready = self._held[:at] if self._begun else self._held[: len(self._held) - begun(self._held, [begin])]
        return self._release(len(ready.rstrip()))

    def finish(self) -> tuple[str, tuple[ToolCall, ...]]:
        """The rest of the text and the calls, at the end of the reply."""
        held, self._held = self._held, ""
        if not self._begun:
            return held, ()
        calls, rest, at = [], "", 0
        while at < len(held):
            start, after = self._next(held, at)
            found, end = self._read(held, after)
            if not found:
                start = end = max(after, at + 1)
            rest += held[at:start]
            calls += found
            at = end
        if not calls:
            return held, ()
        return rest if rest.strip() else "", tuple(tool_call(call, self._form.id_length) for call in calls)

    def _next(self, held: str, at: int) -> tuple[int, int]:
        """Where the next calls may begin: the place of the mark, and that after it."""
        begin = self._form.begin
        if at == 0 and self._form.bare and held.lstrip()[:1] in self._form.bare:
            return 0, 0
        start = held.find(begin, at) if begin else -1
        return (len(held), len(held)) if start < 0 else (start, start + len(begin))

    def _read(self, held: str, at: int) -> tuple[list[Call], int]:
        """The calls from `at` on, and the place after them and their end mark."""
        calls: list[Call] = []
        while True:
            found = next(filter(None, (read(held, at, self._tools) for read in self._form.readers)), None)
            if found is None:
                break
            calls += found[0]
            at = _after(held, found[1], ";,")
        if calls and self._form.end and held.startswith(self._form.end, at):
            at += len(self._form.end)
        return calls, at

    def _release(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        return text


def _after(text: str, at: int, separators: str) -> int:
    """The place of what follows white space and separators."""
    while at < len(text) and (text[at].isspace() or text[at] in separators):
        at += 1
    return at
