"""The body of `/v1/responses` as that of a chat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgemoe.server.protocols import fields
from edgemoe.server.protocols.chat_body import EXTRAS, Conversation, joined_text, objects, taken
from edgemoe.server.protocols.fields import FieldError

LABELS = (
    "user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "prompt_cache_options",
    "access_programs", "max_tool_calls", "client_metadata", "store", "service_tier",
)  # fmt: skip
"""Fields that do not bear on the reply."""
PLAIN: dict[str, tuple[Any, ...]] = {
    "background": (False,),
    "truncation": ("disabled",),
    "previous_response_id": (),
    "conversation": (),
    "prompt": (),
    "moderation": (),
    "context_management": ([],),
}
"""Fields that are served only where their value asks for nothing; nothing is stored."""
OWN = (
    "model", "input", "instructions", "max_output_tokens", "temperature", "top_p", "top_logprobs", "include",
    "reasoning", "text", "tools", "tool_choice", "parallel_tool_calls", "stream", "stream_options", *EXTRAS,
)  # fmt: skip
INCLUDED = ("message.output_text.logprobs", "reasoning.encrypted_content")
"""What may be asked to be included; reasoning is never encrypted."""
HOSTED = ("web_search", "file_search", "code_interpreter", "image_generation", "mcp")
"""What the types of tools begin with that OpenAI's servers run."""
TOOL_LABELS = ("defer_loading", "allowed_callers", "output_schema")
"""Fields of a function that do not bear on its call."""
_TEXTS = ("input_text", "output_text", "text")


def chat_body(body: Mapping[str, Any]) -> dict[str, Any]:
    """The chat that `body` asks for. Raises FieldError."""
    fields.check_fields({name: value for name, value in body.items() if name not in LABELS}, OWN, PLAIN)
    if body.get("input") is None:
        raise FieldError("input is missing: give a text, or a list of items")
    chat = taken(body, ("temperature", "top_p", "parallel_tool_calls", *EXTRAS))
    chat["messages"] = _conversation(body)
    if body.get("max_output_tokens") is not None:
        chat["max_tokens"] = fields.whole("max_output_tokens", body["max_output_tokens"])
    if wants_logprobs(body):
        chat |= {"logprobs": True, "top_logprobs": body.get("top_logprobs") or 0}
    reasoning = _object(body, "reasoning")
    if reasoning.get("effort") is not None:
        chat["reasoning_effort"] = reasoning["effort"]
    form = _object(body, "text").get("format")
    if form is not None:
        chat["response_format"] = _response_format(form)
    if body.get("tools"):
        chat["tools"] = [_tool(tool) for tool in objects("tools", body["tools"]) if not _is_hosted(tool)]
    if body.get("tool_choice") is not None:
        chat["tool_choice"] = _tool_choice(body["tool_choice"])
    return chat


def wants_logprobs(body: Mapping[str, Any]) -> bool:
    """Whether the reply has log-probabilities. Raises FieldError."""
    include = body.get("include") or []
    if not isinstance(include, list):
        raise fields.mistyped("include", "a list of texts", include)
    unknown = [each for each in include if each not in INCLUDED]
    if unknown:
        raise FieldError(f"include has {str(unknown[0])[:60]!r}, but only {' and '.join(INCLUDED)} are served")
    return INCLUDED[0] in include or bool(body.get("top_logprobs"))


def _conversation(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    conversation = Conversation()
    if body.get("instructions") is not None:
        conversation.say("system", fields.words("instructions", body["instructions"]))
    given = body["input"]
    if isinstance(given, str):
        conversation.say("user", fields.words("input", given))
        return conversation.messages
    for item in objects("input", given):
        _add_item(conversation, item)
    return conversation.messages


def _add_item(conversation: Conversation, item: dict[str, Any]) -> None:
    kind = item.get("type") or "message"
    if kind == "message":
        role, text = fields.words("role", item.get("role")), joined_text("content", item.get("content"), _TEXTS)
        conversation.answered(text) if role == "assistant" else conversation.say(role, text)
    elif kind == "function_call":
        conversation.called(*(fields.words(name, item.get(name)) for name in ("call_id", "name", "arguments")))
    elif kind == "function_call_output":
        identifier = fields.words("call_id", item.get("call_id"))
        conversation.say("tool", joined_text("output", item.get("output"), _TEXTS), tool_call_id=identifier)
    elif kind == "reasoning":
        parts = item.get("content") or item.get("summary") or []
        conversation.reasoned(joined_text("content", parts, ("reasoning_text", "summary_text")))
    else:
        raise FieldError(f"input has an item of type {str(kind)[:40]!r}, which is not served")


def _object(body: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = body.get(name)
    if value is not None and not isinstance(value, dict):
        raise fields.mistyped(name, "an object", value)
    return value or {}


def _response_format(form: Any) -> dict[str, Any]:
    if not isinstance(form, dict):
        raise fields.mistyped("format", "an object", form)
    if form.get("type") != "json_schema":
        return form
    return {"type": "json_schema", "json_schema": {name: value for name, value in form.items() if name != "type"}}


def _is_hosted(tool: dict[str, Any]) -> bool:
    """Whether OpenAI's own servers run `tool`: here no reply can call it."""
    return str(tool.get("type")).startswith(HOSTED)


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise FieldError(f"tools has one of type {str(tool.get('type'))[:40]!r}, but only function is served")
    function = {name: value for name, value in tool.items() if name not in ("type", *TOOL_LABELS)}
    return {"type": "function", "function": function}


def _tool_choice(choice: Any) -> Any:
    if isinstance(choice, dict) and choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    return choice
