"""The body of `/v1/messages` as that of a chat."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from edgemoe.server.protocols import fields
from edgemoe.server.protocols.chat_body import EXTRAS, Conversation, joined_text, objects, taken
from edgemoe.server.protocols.fields import FieldError

LABELS = (
    "metadata",
    "cache_control",
    "service_tier",
    "inference_geo",
    "diagnostics",
    "user_profile_id",
    "workspace_id",
    "context_management",
)
"""Fields that do not bear on the reply."""
PLAIN: dict[str, tuple[Any, ...]] = {
    "container": (), "mcp_servers": ([],), "speed": ("standard",),
}  # fmt: skip
"""Fields that are served only where their value asks for nothing."""
OWN = (
    "model", "messages", "system", "max_tokens", "stop_sequences", "stream", "temperature", "top_p", "thinking",
    "output_config", "tools", "tool_choice", *EXTRAS,
)  # fmt: skip


def chat_body(body: Mapping[str, Any], *, counts: bool = False) -> dict[str, Any]:
    """The chat that `body` asks for; with `counts` only its prompt's tokens are wanted. Raises FieldError."""
    fields.check_fields({name: value for name, value in body.items() if name not in LABELS}, OWN, PLAIN)
    needed = ("messages",) if counts else ("max_tokens", "messages")
    for name in needed:
        if body.get(name) is None:
            raise FieldError(f"{name} is missing: Anthropic's protocol needs it")
    chat = taken(body, ("temperature", "top_p", "max_tokens", *EXTRAS))
    chat["messages"] = _conversation(body)
    if body.get("stop_sequences") is not None:
        chat["stop"] = body["stop_sequences"]
    kwargs = _thinking(body.get("thinking")) | fields.template_kwargs(body)
    if kwargs:
        chat["chat_template_kwargs"] = kwargs
    chat |= _output_config(body.get("output_config"))
    if body.get("tools"):
        chat["tools"] = [_tool(tool) for tool in objects("tools", body["tools"])]
    if body.get("tool_choice") is not None:
        chat |= _tool_choice(body["tool_choice"])
    return chat


def _conversation(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    conversation = Conversation()
    if body.get("system"):
        conversation.say("system", joined_text("system", body["system"], ("text",)))
    messages = objects("messages", body["messages"])
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if role not in ("user", "assistant", "system"):
            raise FieldError(f"messages has the role {str(role)[:40]!r}, but only user and assistant are served")
        if role == "assistant":
            _add_assistant(conversation, content)
        else:
            _add_user(conversation, role, content)
    if messages and messages[-1].get("role") == "assistant":
        raise FieldError("messages must end with the user's: an assistant's last message is not continued")
    return conversation.messages


def _add_user(conversation: Conversation, role: str, content: Any) -> None:
    """A user's message: texts, and results of tools before them."""
    if isinstance(content, str):
        conversation.say(role, fields.words("content", content))
        return
    texts = []
    for block in objects("content", content):
        if block.get("type") == "tool_result":
            identifier = fields.words("tool_use_id", block.get("tool_use_id"))
            result = joined_text("content", block.get("content") or "", ("text",))
            conversation.say("tool", result, tool_call_id=identifier)
        else:
            texts.append(joined_text("content", [block], ("text",)))
    if texts:
        conversation.say(role, "".join(texts))


def _add_assistant(conversation: Conversation, content: Any) -> None:
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else objects("content", content)
    for block in blocks:
        kind = block.get("type")
        if kind == "thinking":
            conversation.reasoned(fields.words("thinking", block.get("thinking")))
        elif kind == "tool_use":
            identifier, name = (fields.words(each, block.get(each)) for each in ("id", "name"))
            conversation.called(identifier, name, json.dumps(block.get("input") or {}, ensure_ascii=False))
        elif kind != "redacted_thinking":
            conversation.answered(joined_text("content", [block], ("text",)))


def _thinking(thinking: Any) -> dict[str, Any]:
    if thinking is None:
        return {}
    if not isinstance(thinking, dict) or not isinstance(thinking.get("type"), str):
        raise fields.mistyped("thinking", "an object with a type", thinking)
    return {"enable_thinking": thinking["type"] != "disabled"}


def _output_config(config: Any) -> dict[str, Any]:
    if config is None:
        return {}
    if not isinstance(config, dict):
        raise fields.mistyped("output_config", "an object", config)
    fields.refuse_unknown(config, ("effort", "format"))
    chat = {} if config.get("effort") is None else {"reasoning_effort": config["effort"]}
    form = config.get("format")
    if form is None:
        return chat
    if not isinstance(form, dict) or form.get("type") != "json_schema" or not isinstance(form.get("schema"), dict):
        raise fields.mistyped("format", "an object of type json_schema with a schema", form)
    schema = {"name": "output", "schema": form["schema"], "strict": True}
    return chat | {"response_format": {"type": "json_schema", "json_schema": schema}}


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    if (tool.get("type") or "custom") != "custom":
        raise FieldError(f"tools has one of type {str(tool['type'])[:40]!r}, but only custom is served")
    function = taken(tool, ("name", "description", "strict")) | {"parameters": tool.get("input_schema") or {}}
    return {"type": "function", "function": function}


def _tool_choice(choice: Any) -> dict[str, Any]:
    kind = choice.get("type") if isinstance(choice, dict) else None
    if kind not in ("auto", "any", "none", "tool"):
        raise fields.mistyped("tool_choice", "an object of type auto, any, tool or none", choice)
    parallel = {"parallel_tool_calls": False} if choice.get("disable_parallel_tool_use") else {}
    if kind == "tool":
        name = fields.words("name", choice.get("name"))
        return parallel | {"tool_choice": {"type": "function", "function": {"name": name}}}
    return parallel | {"tool_choice": "required" if kind == "any" else kind}
