"""How models write calls of tools: one row for each format, found by what the template and the tokenizer have."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from edgemoe.request.call_readers import Reader, named, python_calls, read_json, tagged
from edgemoe.request.token_texts import TokenTexts

NAME, ARGUMENTS = object(), object()
"""In `CallFormat.written`: where a call has its name, and its arguments as JSON."""
_FUNCTION = tagged(
    r"\s*<function=(?P<name>[^>\s]+)>\s*",
    r"<parameter=(?P<key>[^>\n]+)>\n?(?P<value>.*?)\n?</parameter>\s*",
    r"</function>\s*",
)
_KEYS = tagged(
    r"\s*(?P<name>[^\s<{]+)\s*",
    r"<arg_key>(?P<key>.*?)</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>\s*",
    r"(?=</tool_call>)",
)


def _invoke(prefix: str = "") -> Reader:
    return tagged(
        rf'\s*<{prefix}invoke name="(?P<name>[^"]+)">\s*',
        rf'<{prefix}parameter name="(?P<key>[^"]+)"(?: string="(?P<string>true|false)")?>(?P<value>.*?)'
        rf"</{prefix}parameter>\s*",
        rf"</{prefix}invoke>\s*",
    )


@dataclass(frozen=True)
class CallFormat:
    """How replies have calls."""

    marks: tuple[str, ...]
    """Texts that the template has, or the tokenizer as tokens."""
    begin: str
    """The text before the first call; empty where a reply that begins with `bare` may be a call."""
    end: str = ""
    """The text after the last of the calls, which may be missing."""
    readers: tuple[Reader, ...] = (read_json,)
    bare: str = ""
    written: tuple[object, ...] = ()
    """A call piece by piece, to have one written; empty where its arguments are no JSON."""
    id_length: int = 0
    """Characters of an id, where the template wants so many; 0 where it does not."""


def _json_call(begin: str, end: str, arguments: str = "arguments") -> tuple[object, ...]:
    """A call as a JSON object, between the texts `begin` and `end`, each a mark with what joins it to the object."""
    marks = re.match(r"(<.*>|\[TOOL_CALLS\])?(.*)", begin, re.DOTALL)
    closing = re.match(r"([^<]*)(<.*>)?", end, re.DOTALL)
    assert marks is not None
    assert closing is not None
    pieces = (marks[1], f'{marks[2]}{{"name": "', NAME, f'", "{arguments}": ', ARGUMENTS, f"}}{closing[1]}", closing[2])
    return tuple(piece for piece in pieces if piece)


_DEEPSEEK = named(
    r"\s*<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>)?(?P<name>[^\s<]+)(?:<｜tool▁sep｜>)?(?:\s*```json)?",
    r"\s*(?:```)?\s*<｜tool▁call▁end｜>",
)
_KIMI = named(
    r"\s*<\|tool_call_begin\|>\s*(?P<id>(?:functions\.)?(?P<name>[^\s:<]+)(?::\d+)?)\s*<\|tool_call_argument_begin\|>",
    r"\s*<\|tool_call_end\|>",
)
_MISTRAL = named(r"\s*(?P<name>[^\s\[{]+)(?:\[CALL_ID\](?P<id>[^\s\[]+))?(?:\[ARGS\])?\s*(?=\{)")

FORMATS = (
    CallFormat(
        ("<|tool_calls_section_begin|>",),
        "<|tool_calls_section_begin|>",
        "<|tool_calls_section_end|>",
        (_KIMI,),
        written=(
            "<|tool_calls_section_begin|>",
            "<|tool_call_begin|>",
            "functions.",
            NAME,
            ":0",
            "<|tool_call_argument_begin|>",
            ARGUMENTS,
            "<|tool_call_end|>",
            "<|tool_calls_section_end|>",
        ),
    ),  # fmt: skip
    CallFormat(
        ("<｜DSML｜function_calls>",), "<｜DSML｜function_calls>", "</｜DSML｜function_calls>", (_invoke("｜DSML｜"),)
    ),
    CallFormat(
        ("<｜tool▁calls▁begin｜>", "function<｜tool▁sep｜>"),
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
        (_DEEPSEEK,),
        written=(
            "<｜tool▁calls▁begin｜>",
            "<｜tool▁call▁begin｜>",
            "function",
            "<｜tool▁sep｜>",
            NAME,
            "\n```json\n",
            ARGUMENTS,
            "\n```",
            "<｜tool▁call▁end｜>",
            "<｜tool▁calls▁end｜>",
        ),
    ),  # fmt: skip
    CallFormat(
        ("<｜tool▁calls▁begin｜>",),
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
        (_DEEPSEEK,),
        written=(
            "<｜tool▁calls▁begin｜>",
            "<｜tool▁call▁begin｜>",
            NAME,
            "<｜tool▁sep｜>",
            ARGUMENTS,
            "<｜tool▁call▁end｜>",
            "<｜tool▁calls▁end｜>",
        ),
    ),  # fmt: skip
    CallFormat(
        ("[TOOL_CALLS]", "[ARGS]"),
        "[TOOL_CALLS]",
        readers=(read_json, _MISTRAL),
        written=("[TOOL_CALLS]", NAME, "[ARGS]", ARGUMENTS),
        id_length=9,
    ),
    CallFormat(
        ("[TOOL_CALLS]",),
        "[TOOL_CALLS]",
        "[/TOOL_CALLS]",
        (read_json, _MISTRAL),
        written=_json_call("[TOOL_CALLS][", "]"),
        id_length=9,
    ),
    CallFormat(("<minimax:tool_call>",), "<minimax:tool_call>", "</minimax:tool_call>", (_invoke(),)),
    CallFormat(("<seed:tool_call>",), "<seed:tool_call>", "</seed:tool_call>", (_FUNCTION,)),
    CallFormat(("<|START_ACTION|>",), "<|START_ACTION|>", "<|END_ACTION|>"),
    CallFormat(
        ("<|tool_call_start|>",),
        "<|tool_call_start|>",
        "<|tool_call_end|>",
        (python_calls("<|tool_call_end|>"), read_json),
    ),
    CallFormat(
        ("<tool_calls>", "<tool_call>"),
        "<tool_calls>",
        "</tool_calls>",
        (named(r"\s*<tool_call>\s*(?P<name>[^\s<]+)\s*```json", r"\s*```\s*</tool_call>"), read_json),
        written=(
            "<tool_calls>",
            "\n",
            "<tool_call>",
            NAME,
            "\n```json\n",
            ARGUMENTS,
            "\n```\n",
            "</tool_call>",
            "\n",
            "</tool_calls>",
        ),
    ),  # fmt: skip
    CallFormat(("<tool_call>", "<function="), "<tool_call>", "</tool_call>", (_FUNCTION, read_json)),
    CallFormat(("<tool_call>", "<arg_key>"), "<tool_call>", "</tool_call>", (_KEYS, read_json)),
    CallFormat(
        ("<tool_call>",),
        "<tool_call>",
        "</tool_call>",
        (read_json, _FUNCTION),
        written=_json_call("<tool_call>\n", "\n</tool_call>"),
    ),
    CallFormat(("<tool_calls>",), "<tool_calls>", "</tool_calls>", written=_json_call("<tool_calls>", "</tool_calls>")),
    CallFormat(("<|tool_call|>",), "<|tool_call|>", "<|/tool_call|>", written=_json_call("<|tool_call|>[", "]")),
    CallFormat(
        ("<|python_start|>",),
        "<|python_start|>",
        "<|python_end|>",
        (read_json, python_calls("<|python_end|>")),
        bare="{[",
        written=_json_call("", "", "parameters"),
    ),
    CallFormat(("<|python_tag|>",), "<|python_tag|>", bare="{", written=_json_call("", "", "parameters")),
    CallFormat(('{"name": function name, "parameters":',), "", bare="{", written=_json_call("", "", "parameters")),
)
"""The first one that fits is a checkpoint's: a row that asks for more stands before one that asks for less."""


HARMONY_CALL = CallFormat(
    (),
    "",
    written=("<|channel|>", "commentary to=functions.", NAME, " ", "<|constrain|>", "json", "<|message|>", ARGUMENTS),
)
"""A call in harmony, which is a message of its own: what reads messages reads it."""


def call_format(texts: TokenTexts, template: str) -> CallFormat | None:
    """The format of a tokenizer and its chat template; None where none is known."""
    tokens = "\n".join(texts.added)
    for known in (template, f"{tokens}\n{template}"):
        for each in FORMATS:
            if all(mark in known for mark in each.marks):
                return each
    return None


def shown_marks(form: CallFormat, texts: TokenTexts) -> frozenset[int]:
    """The special tokens that must have a text for calls to be read."""
    source = [form.begin, form.end, *MARKS]
    found = [texts.id_of(mark) for mark in source if mark]
    return frozenset(token for token in found if token is not None)


MARKS: Sequence[str] = (
    "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>", "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "[CALL_ID]", "[ARGS]", "<arg_key>", "</arg_key>", "<arg_value>",
    "</arg_value>", "<tool_call>", "</tool_call>",
)  # fmt: skip
"""Tokens inside of calls."""
