"""Readers of calls of tools: JSON, a name and JSON, parameters between tags, and Python's calls.

A reader takes a text, a place in it and the tools, and returns the calls that begin there, and the place after them;
None where no well-formed call of one of the tools begins there.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn

Tools = Mapping[str, Mapping[str, Any]]
"""The JSON schema of each tool's parameters, by its name."""
MAX_PYTHON = 100_000
"""Characters of Python's calls: its parser takes much memory for a character."""
_SPACE = re.compile(r"\s*")


class Call(NamedTuple):
    """A call in a reply."""

    name: str
    arguments: dict[str, Any]
    id: str = ""
    """What the model calls it; empty where it does not."""


Read = tuple[list[Call], int] | None
Reader = Callable[[str, int, Tools], Read]


def read_json(text: str, at: int, tools: Tools) -> Read:
    """An object with a name and arguments, or a list of such objects."""
    found = json_at(text, at)
    if found is None:
        return None
    value, end = found
    calls = [_call_of(item, tools) for item in (value if isinstance(value, list) else [value])]
    whole = [call for call in calls if call is not None]
    return (whole, end) if whole and len(whole) == len(calls) else None


def named(head: str, tail: str = "") -> Reader:
    """The reader of a call whose name, and maybe its id, are groups of the expression `head`, before its arguments."""
    before, after = re.compile(head), re.compile(tail)

    def read(text: str, at: int, tools: Tools) -> Read:
        begun = before.match(text, at)
        if begun is None or begun["name"] not in tools:
            return None
        found = json_at(text, begun.end())
        if found is None or not isinstance(found[0], dict):
            return None
        ended = after.match(text, found[1])
        call = Call(begun["name"], found[0], begun.groupdict().get("id") or "")
        return None if ended is None else ([call], ended.end())

    return read


def tagged(head: str, parameter: str, tail: str = "") -> Reader:
    """The reader of a call whose name is a group of `head`, and its parameters one `parameter` each, then `tail`.

    `parameter` has the groups key and value, and maybe `string`: "true" where the value is a text. All are regular
    expressions.
    """
    before, each, after = re.compile(head), re.compile(parameter, re.DOTALL), re.compile(tail)

    def read(text: str, at: int, tools: Tools) -> Read:
        begun = before.match(text, at)
        if begun is None or begun["name"] not in tools:
            return None
        schemas = tools[begun["name"]].get("properties")
        arguments: dict[str, Any] = {}
        at = begun.end()
        while (found := each.match(text, at)) is not None:
            schema = schemas.get(found["key"]) if isinstance(schemas, Mapping) else None
            is_text = found.groupdict().get("string")
            schema = schema if is_text is None else {"type": "string" if is_text == "true" else "object"}
            arguments[found["key"]] = _value(found["value"], schema)
            at = found.end()
        ended = after.match(text, at)
        return None if ended is None else ([Call(begun["name"], arguments)], ended.end())

    return read


def python_calls(closing: str) -> Reader:
    """The reader of a list of calls in Python's syntax, up to the text `closing` or the end."""

    def read(text: str, at: int, tools: Tools) -> Read:
        end = text.find(closing, at) if closing else -1
        end = len(text) if end < 0 else end
        if end - at > MAX_PYTHON:
            return None
        try:
            value = ast.parse(text[at:end].strip(), mode="eval").body
            items = value.elts if isinstance(value, ast.List) else [value]
            calls = [_python_call(item) for item in items]
            json.dumps([call.arguments for call in calls], allow_nan=False)
        except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
            return None
        return (calls, end) if calls and all(call.name in tools for call in calls) else None

    return read


def _python_call(item: ast.AST) -> Call:
    if not isinstance(item, ast.Call) or item.args:
        raise ValueError("no call with named arguments alone")
    arguments = {keyword.arg: ast.literal_eval(keyword.value) for keyword in item.keywords if keyword.arg is not None}
    if len(arguments) < len(item.keywords):
        raise ValueError("an argument has no name")
    return Call(ast.unparse(item.func), arguments)


def json_at(text: str, at: int) -> tuple[Any, int] | None:
    """The JSON value that begins at `at`, white space aside, and the place after it; None where there is none."""
    space = _SPACE.match(text, at)
    assert space is not None
    try:
        value, end = _DECODER.raw_decode(text, space.end())
    except (ValueError, RecursionError):
        return None
    return value, end


def whole_json(text: str) -> tuple[Any] | None:
    """The JSON value that all of `text` is, white space aside; None where it is none."""
    found = json_at(text, 0)
    return None if found is None or text[found[1] :].strip() else (found[0],)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse(text)


_DECODER = json.JSONDecoder(parse_constant=_refuse, parse_float=_finite)


def _call_of(item: Any, tools: Tools) -> Call | None:
    """The call that a JSON value is; None where it is none of one of the tools."""
    if not isinstance(item, dict):
        return None
    function = item["function"] if isinstance(item.get("function"), dict) else item
    name = function.get("name", function.get("tool_name"))
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        found = whole_json(arguments)
        arguments = found[0] if found is not None else arguments
    arguments = {} if arguments is None else arguments
    if not isinstance(name, str) or name not in tools or not isinstance(arguments, dict):
        return None
    given = item.get("id", item.get("tool_call_id"))
    return Call(name, arguments, given if isinstance(given, str) else "")


def _value(text: str, schema: Any) -> Any:
    """A parameter's value, which stands between tags: of the type of its schema, else a text."""
    kinds = schema.get("type") if isinstance(schema, Mapping) else None
    if kinds == "string":
        return text
    found = whole_json(text)
    if found is not None:
        return found[0]
    return {"True": True, "False": False, "None": None}.get(text.strip(), text)
