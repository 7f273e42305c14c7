"""What clients of OpenAI and Anthropic send without being asked, and fields that other servers take."""

from __future__ import annotations

import json
from typing import Any

import pytest

from edgemoe import ChatPrompt, Chunk
from edgemoe.results import ToolCall
from edgemoe.server.protocols.anthropic_messages import MessageReply
from edgemoe.server.protocols.errors import ApiError
from edgemoe.server.protocols.fields import FieldError
from edgemoe.server.protocols.openai_chat import ChatReply
from edgemoe.server.protocols.openai_responses import ResponseReply
from edgemoe.server.protocols.reply import Reply, ServedModel
from tests.support.fake_engine import timings

SERVED = ServedModel("the-model", 1_700_000_000)
USER = [{"role": "user", "content": "Hi"}]
BODIES: dict[type[Reply], dict[str, Any]] = {
    ChatReply: {"messages": USER},
    ResponseReply: {"input": "Hi"},
    MessageReply: {"messages": USER, "max_tokens": 9},
}
TOOLS: list[dict[str, Any]] = [{"type": "function", "function": {"name": name}} for name in ("add", "sub", "mul")]
CALLS = tuple(ToolCall(f"call_{name}", name, "{}") for name in ("add", "sub"))


MIDDLE = Chunk("text", (1,), None, None, timings(7, 1))
LAST = Chunk("", (2,), "tool_calls", None, timings(7, 2), tool_calls=CALLS)


def names(asked: Any) -> list[str]:
    """The tools that a reply is asked with."""
    return [tool["function"]["name"] for tool in asked[0][0].tools]


def test_one_call_at_most() -> None:
    flat = [{"type": "function", **tool["function"]} for tool in TOOLS]
    named = [{"name": tool["function"]["name"], "input_schema": {}} for tool in TOOLS]
    no_more = {"type": "any", "disable_parallel_tool_use": True}
    for reply in (
        ChatReply({"messages": USER, "tools": TOOLS, "parallel_tool_calls": False}, SERVED),
        ResponseReply({"input": "Hi", "tools": flat, "parallel_tool_calls": False}, SERVED),
        MessageReply({"messages": USER, "max_tokens": 9, "tools": named, "tool_choice": no_more}, SERVED),
    ):
        assert names(reply.asked) == ["add", "sub", "mul"]
        assert reply.limited(LAST).tool_calls == CALLS[:1]
        assert reply.limited(MIDDLE) is MIDDLE
    assert ChatReply({"messages": USER, "tools": TOOLS}, SERVED).limited(LAST) is LAST


def test_some_tools_alone_are_allowed() -> None:
    listed = [{"type": "function", "function": {"name": "mul"}}]
    choice: dict[str, Any] = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": listed}}
    chat = ChatReply({"messages": USER, "tools": TOOLS, "tool_choice": choice}, SERVED)
    assert names(chat.asked) == ["mul"]
    assert isinstance(chat.asked[0][0], ChatPrompt)
    assert chat.asked[0][0].tool_choice == "required"
    flat: list[dict[str, Any]] = [{"type": "function", **tool["function"], "output_schema": None} for tool in TOOLS]
    choice = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "sub"}]}
    tools = [*flat, {"type": "web_search"}]
    assert names(ResponseReply({"input": "Hi", "tools": tools, "tool_choice": choice}, SERVED).asked) == ["sub"]
    with pytest.raises(FieldError, match="allowed_tools needs tools and a mode"):
        ChatReply({"messages": USER, "tools": TOOLS, "tool_choice": {"type": "allowed_tools"}}, SERVED)
    listed[0]["function"] = {"name": "div"}
    with pytest.raises(FieldError, match="tool_choice allows 'div', which is none of tools"):
        ChatReply(
            {
                "messages": USER,
                "tools": TOOLS,
                "tool_choice": choice | {"allowed_tools": {"mode": "auto", "tools": listed}},
            },
            SERVED,
        )
    with pytest.raises(FieldError, match="one of type 'custom'"):
        ResponseReply({"input": "Hi", "tools": [{"type": "custom", "name": "patch"}]}, SERVED)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        (ChatReply, {"service_tier": "flex", "store": True, "function_call": "none", "functions": []}),
        (ChatReply, {"logprobs": False, "top_logprobs": 0, "seed": -7}),
        (ResponseReply, {"client_metadata": {"a": "b"}, "store": True, "tools": [{"type": "web_search"}]}),
        (ResponseReply, {"input": [{"type": None, "role": "user", "content": "Hi"}]}),
        (MessageReply, {"context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}}),
        (MessageReply, {"tools": [{"type": None, "name": "f" * 128, "input_schema": {}}]}),
    ],
)
def test_what_clients_send_unasked_is_taken(kind: type[Any], more: dict[str, Any]) -> None:
    assert len(kind(BODIES[kind] | more, SERVED).asked) == 1


def test_numbers_as_other_servers_take_them() -> None:
    (_, sampling) = ChatReply({"messages": USER, "seed": -1, "top_p": 0}, SERVED).asked[0]
    assert sampling.seed is None
    assert sampling.top_p is not None
    assert 0 < sampling.top_p < 1e-300
    (_, sampling) = ChatReply({"messages": USER, "seed": -2}, SERVED).asked[0]
    assert sampling.seed == (1 << 63) - 2


def test_messages_of_other_libraries() -> None:
    said = [
        {"role": "user", "content": "Hi", "name": "Al"},
        {"role": "assistant", "content": None, "refusal": "No.", "name": "model"},
        {"role": "assistant"},
        {"role": "user", "content": "Why?"},
    ]
    (asked, _) = ChatReply({"messages": said}, SERVED).asked[0]
    assert isinstance(asked, ChatPrompt)
    assert [message["content"] for message in asked.messages] == ["Hi", "No.", "", "Why?"]
    assert not any("name" in message or "refusal" in message for message in asked.messages)


def test_a_failed_response_has_a_code_of_the_protocol() -> None:
    (sent,) = ResponseReply({"input": "Hi", "stream": True, "tools": None}, SERVED).failure(
        ApiError(503, "the server ends", code="shutting_down")
    )
    told = json.loads(sent.decode().split("data: ")[1])["response"]
    assert told["error"] == {"code": "server_error", "message": "the server ends"}
    assert told["tools"] == []
