"""Messages and tools of a conversation in OpenAI's shapes, checked, and as chat templates read them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from edgemoe.errors import RequestError
from edgemoe.response_format import checked_json
from edgemoe.values import shown

Message = dict[str, Any]
_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
_TOOL_FIELDS = ("name", "description", "parameters", "strict")


class CallForm(NamedTuple):
    """How a chat template reads an assistant's message with calls of tools."""

    content: str | None
    """The content of a message that has none; None where it has no content at all, as transformers has it."""
    as_text: bool
    """Whether arguments are a text of JSON, and not an object."""


CALL_FORMS = (CallForm("", False), CallForm(None, False), CallForm("", True), CallForm(None, True))


def checked_messages(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Copies of `messages`: text parts are joined, and the arguments of calls are objects.

    Raises RequestError, with the value, for what is malformed, and by name for content that is not text.
    """
    if not messages:
        raise RequestError("the conversation is empty: give at least one message")
    return [_checked_message(message) for message in messages]


def _checked_message(message: Mapping[str, Any]) -> Message:
    if not isinstance(message, Mapping):
        raise RequestError(f"a message must be an object with a role and a content, not {shown(message)}")
    made = dict(message)
    if not made.get("tool_calls"):
        made.pop("tool_calls", None)
    elif made.get("role") != "assistant":
        raise RequestError("only an assistant's message may have tool_calls: leave them out of the others")
    else:
        calls = checked_json(made["tool_calls"], "tool_calls")
        made["tool_calls"] = _checked_calls(calls)
        made["content"] = "" if made.get("content") is None else made["content"]
    if isinstance(made.get("content"), (list, tuple)):
        made["content"] = "".join(map(_text_of, made["content"]))
    for name in ("name", "tool_call_id"):
        if made.get(name) is None:
            made.pop(name, None)
        elif not isinstance(made[name], str):
            raise RequestError(f"{name} of a message must be a text, not {shown(made[name])}")
    parts = [made.get("role"), made.get("content"), made.get("reasoning_content", "")]
    if not all(isinstance(part, str) for part in parts):
        raise RequestError(f"a message must have a text role and a text content, not {shown(dict(message))}")
    return made


def _text_of(part: Any) -> str:
    """The text of one part of a content."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind != "text":
        named = shown(kind) if kind is not None else shown(part)
        raise RequestError(f"content of the type {named} is not served: give text parts alone")
    if not isinstance(part.get("text"), str):
        raise RequestError(f"the text of a text part must be a text, not {shown(part.get('text'))}")
    return str(part["text"])


def _checked_calls(calls: Any) -> list[Message]:
    if not isinstance(calls, list):
        raise _no_call(calls)
    return [_checked_call(call) for call in calls]


def _checked_call(call: Any) -> Message:
    function = call.get("function") if isinstance(call, dict) and call.get("type", "function") == "function" else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise _no_call(call)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the arguments of a call of {function['name']} are not JSON ({error})") from None
    if not isinstance(arguments, dict):
        raise RequestError(f"the arguments of a call of {function['name']} must be an object, not {shown(arguments)}")
    made = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    if call.get("id") is not None and not isinstance(call["id"], str):
        raise RequestError(f"the id of a call of {function['name']} must be a text, not {shown(call['id'])}")
    return made if call.get("id") is None else {"id": call["id"], **made}


def _no_call(value: Any) -> RequestError:
    return RequestError(
        f"tool_calls must be functions with a name and arguments, as in OpenAI's API, not {shown(value)}"
    )


def with_call_form(message: Message, form: CallForm) -> Message:
    """A checked message in the form that a template reads calls in."""
    if "tool_calls" not in message:
        return message
    calls = message["tool_calls"]
    if form.as_text:
        calls = [
            {**call, "function": {**call["function"], "arguments": _as_text(call["function"]["arguments"])}}
            for call in calls
        ]
    return {**message, "content": message["content"] or form.content, "tool_calls": calls}


def _as_text(arguments: Any) -> str:
    return json.dumps(arguments, ensure_ascii=False)


def checked_tools(tools: Any) -> list[dict[str, Any]]:
    """A copy of `tools` in OpenAI's shape. Raises RequestError, with the value, for any other."""
    if not isinstance(tools, Sequence) or isinstance(tools, (str, bytes)):
        raise RequestError(f"tools must be a list, not {shown(tools)}")
    found = [_checked_tool(tool) for tool in checked_json(list(tools), "tools")]
    names = [tool["function"]["name"] for tool in found]
    counts = Counter(names)
    twice = next((name for name in names if counts[name] > 1), None)
    if twice is not None:
        raise RequestError(f"tools has two functions of the name {twice}: give each its own")
    return found


def _checked_tool(tool: Any) -> dict[str, Any]:
    if not isinstance(tool, dict) or not isinstance(tool.get("function"), dict) or tool.get("type") != "function":
        kind = tool.get("type") if isinstance(tool, dict) else tool
        raise RequestError(f'a tool must have the type "function" and an object under "function", not {shown(kind)}')
    function = tool["function"]
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RequestError(f"the name of a tool must be 1 to 128 letters, digits and any of _.:-, not {shown(name)}")
    unknown = sorted(set(function) - set(_TOOL_FIELDS))
    if unknown:
        raise RequestError(f"the tool {name} has the unknown field {shown(unknown[0])}: known are {_TOOL_FIELDS}")
    for field, kind in (("description", str), ("parameters", dict), ("strict", bool)):
        if function.get(field) is not None and not isinstance(function[field], kind):
            raise RequestError(f"{field} of the tool {name} must be a {kind.__name__}, not {shown(function[field])}")
    return dict(tool)


def check_chat(messages: Sequence[Mapping[str, Any]], tools: Any = (), tool_choice: Any = "auto") -> None:
    """Raises RequestError for messages, tools or a choice of tools that are malformed, whatever the template is."""
    checked_messages(messages)
    chosen_tools(tools, tool_choice)


def chosen_tools(tools: Sequence[Mapping[str, Any]], choice: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The tools that are offered, and those of which one must be called.

    `choice` is OpenAI's `tool_choice`. Raises RequestError for any other value, and for the name of no tool.
    """
    offered = checked_tools(tools)
    if choice in (None, "auto"):
        return offered, []
    if choice == "none":
        return [], []
    if not offered:
        raise RequestError("tool_choice needs tools: give them, or leave it out")
    if choice == "required":
        return offered, offered
    function = choice.get("function") if isinstance(choice, Mapping) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, Mapping) else None
    wanted = [tool for tool in offered if tool["function"]["name"] == name]
    if not wanted:
        raise RequestError(
            'tool_choice must be "none", "auto", "required" or a function that is one of tools, not '
            f"{shown(name if name is not None else choice)}"
        )
    return offered, wanted
