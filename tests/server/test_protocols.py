"""From bodies to what the engine is asked, and from chunks to events, without sockets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from edgemoe import ChatPrompt, Chunk, Completion
from edgemoe.errors import RequestError
from edgemoe.results import TokenLogprob, ToolCall
from edgemoe.server.protocols import anthropic_input, responses_input
from edgemoe.server.protocols.anthropic_messages import MessageReply
from edgemoe.server.protocols.errors import ApiError, api_error
from edgemoe.server.protocols.fields import FieldError
from edgemoe.server.protocols.json_body import MAX_DEPTH, read_json_object
from edgemoe.server.protocols.openai_chat import ChatReply
from edgemoe.server.protocols.openai_completions import CompletionReply
from edgemoe.server.protocols.openai_responses import ResponseReply
from edgemoe.server.protocols.reply import Reply, ServedModel
from tests.support.fake_engine import timings

SERVED = ServedModel("the-model", 1_700_000_000, frozenset({"other"}))
USER = [{"role": "user", "content": "Hi"}]
BODIES: dict[type[Reply], dict[str, Any]] = {
    ChatReply: {"messages": USER},
    ResponseReply: {"input": "Hi"},
    MessageReply: {"messages": USER, "max_tokens": 9},
}


def chunk(text: str = "", reasoning: str = "", end: str | None = None, number: int = 1, **more: Any) -> Chunk:
    return Chunk(text, (number,), end, None, timings(7, number), reasoning, **more)


REPLY = [
    chunk(reasoning="Let me", number=1, reasons=True), chunk(reasoning=" see.", number=2, reasons=True),
    chunk(number=3, reasons=True), chunk("It ", number=4),
    chunk("is 4.", number=5), chunk(end="stop", number=6),
]  # fmt: skip


def events(reply: Reply, chunks: Sequence[Chunk]) -> list[dict[str, Any]]:
    """The JSON of all events of a stream."""
    sent = [*reply.opening(), *(event for each in chunks for event in reply.chunk(0, each)), *reply.closing()]
    lines = [line for event in sent for line in event.decode().splitlines() if line.startswith("data: {")]
    return [json.loads(line[6:]) for line in lines]


def test_a_chat_tells_reasoning_apart() -> None:
    told = events(ChatReply({"messages": USER, "stream": True}, SERVED), REPLY)
    deltas = [event["choices"][0]["delta"] for event in told]
    assert deltas[0]["role"] == "assistant"
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Let me see."
    assert "".join(delta.get("content", "") for delta in deltas) == "It is 4."
    # A token without text is no event.
    assert len(told) == len(REPLY) - 1
    whole = ChatReply({"messages": USER}, SERVED).whole([Completion.from_chunks(REPLY, ())])
    message = whole["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Let me see.", "It is 4.")


def test_a_response_has_an_item_for_reasoning_and_one_for_the_message() -> None:
    told = events(ResponseReply({"input": "Hi", "stream": True}, SERVED), REPLY)
    final = told[-1]["response"]
    assert [(item["type"], item["status"]) for item in final["output"]] == [
        ("reasoning", "completed"),
        ("message", "completed"),
    ]
    assert final["output"][0]["content"] == [{"type": "reasoning_text", "text": "Let me see."}]
    assert final["usage"]["output_tokens_details"] == {"reasoning_tokens": 3}
    assert final["usage"]["output_tokens"] == 6
    whole = ResponseReply({"input": "Hi"}, SERVED).whole([Completion.from_chunks(REPLY, ())])
    assert [item["content"] for item in whole["output"]] == [item["content"] for item in final["output"]]


def test_a_message_has_a_block_for_thinking_and_one_for_text() -> None:
    told = events(MessageReply({"messages": USER, "max_tokens": 9, "stream": True}, SERVED), REPLY)
    assert [(event["index"], event["content_block"]["type"]) for event in told if event["type"].endswith("start") and
            "index" in event] == [(0, "thinking"), (1, "text")]  # fmt: skip
    deltas = [event["delta"] for event in told if event["type"] == "content_block_delta"]
    assert "".join(delta.get("thinking", "") for delta in deltas) == "Let me see."
    assert "".join(delta.get("text", "") for delta in deltas) == "It is 4."
    assert told[0]["message"]["usage"]["input_tokens"] == 7
    assert told[-2]["usage"]["output_tokens"] == 6
    whole = MessageReply({"messages": USER, "max_tokens": 9}, SERVED).whole([Completion.from_chunks(REPLY, ())])
    assert [block["type"] for block in whole["content"]] == ["thinking", "text"]


@pytest.mark.parametrize("kind", BODIES)
def test_a_reply_without_any_text_is_a_whole_one(kind: type[Any]) -> None:
    made = kind(BODIES[kind] | {"stream": True}, SERVED)
    assert events(made, [chunk(end="stop")])
    assert kind(BODIES[kind], SERVED).whole([Completion.from_chunks([chunk(end="stop")], ())])


@pytest.mark.parametrize("kind", BODIES)
def test_an_error_after_the_beginning_is_an_event(kind: type[Any]) -> None:
    made = kind(BODIES[kind] | {"stream": True}, SERVED)
    made.opening()
    made.chunk(0, REPLY[0])
    (first, *_) = made.failure(ApiError(503, "the server is being shut down"))
    assert b"the server is being shut down" in first


def test_a_completion_without_a_tokenizer_has_token_ids() -> None:
    reply = CompletionReply({"prompt": [1, 2], "stream": True}, SERVED)
    reply.has_tokenizer = False
    told = events(reply, [chunk(number=5), chunk(end="length", number=6)])
    assert [event["choices"][0]["token_ids"] for event in told] == [[5], [6]]


def test_prompts_of_completions() -> None:
    def asked(prompt: Any, **more: Any) -> list[Any]:
        return [each for each, _ in CompletionReply({"prompt": prompt, **more}, SERVED).asked]

    assert asked("a") == ["a"]
    assert asked(["a", "b"], n=2) == ["a", "a", "b", "b"]
    assert asked([1, 2]) == [(1, 2)]
    assert asked([[1, 2], [3]]) == [(1, 2), (3,)]
    refused: list[Any] = [[[]] * 3000, [None], {"a": 1}, [1, "a"]]
    for wrong in refused:
        with pytest.raises(FieldError):
            asked(wrong)


def test_logprobs_of_a_response_have_bytes() -> None:
    entry = TokenLogprob(3, "\N{REPLACEMENT CHARACTER}", -0.5, ((3, "\N{REPLACEMENT CHARACTER}", -0.5),))
    one = Chunk("é", (3,), "stop", (entry,), timings(7, 1))
    told = ResponseReply({"input": "Hi", "top_logprobs": 1}, SERVED).whole([Completion.from_chunks([one], ())])
    (got,) = told["output"][0]["content"][0]["logprobs"]
    assert (got["bytes"], got["top_logprobs"][0]["bytes"]) == ([], [])


# --- what is asked -------------------------------------------------------------------------------


def test_items_of_a_response_become_messages() -> None:
    tool = {"type": "function", "name": "f", "parameters": {"type": "object"}}
    body = {
        "instructions": "Be brief.",
        "input": [
            {"role": "developer", "content": [{"type": "input_text", "text": each} for each in ("And ", "kind.")]},
            {"type": "message", "role": "user", "content": "What is f(1)?"},
            {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "I call f."}]},
            {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"x": 1}'},
            {"type": "function_call", "call_id": "c2", "name": "f", "arguments": '{"x": 2}'},
            {"type": "function_call_output", "call_id": "c1", "output": "3"},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "It is 3."}]},
        ],
        "tools": [tool], "tool_choice": {"type": "function", "name": "f"}, "max_output_tokens": 7,
        "reasoning": {"effort": "low"},
        "text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}},
    }  # fmt: skip
    chat = responses_input.chat_body(body)
    calls = [
        {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}},
        {"id": "c2", "type": "function", "function": {"name": "f", "arguments": '{"x": 2}'}},
    ]
    assert chat["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "system", "content": "And kind."},
        {"role": "user", "content": "What is f(1)?"},
        {"role": "assistant", "content": "", "reasoning_content": "I call f.", "tool_calls": calls},
        {"role": "tool", "content": "3", "tool_call_id": "c1"},
        {"role": "assistant", "content": "It is 3."},
    ]
    assert chat["tools"] == [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    assert chat["tool_choice"] == {"type": "function", "function": {"name": "f"}}
    assert chat["max_tokens"] == 7
    assert chat["reasoning_effort"] == "low"
    assert chat["response_format"] == {
        "type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}, "strict": True}
    }  # fmt: skip


def test_blocks_of_a_message_become_messages() -> None:
    body = {
        "max_tokens": 9,
        "system": "Be brief.",
        "messages": [
            {"role": "user", "content": "What is f(1)?"},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "I call f.", "signature": ""},
                    {"type": "text", "text": "Let me see."},
                    {"type": "tool_use", "id": "c1", "name": "f", "input": {"x": 1}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "3"}]},
                    {"type": "text", "text": "Well?"},
                ],
            },
        ],
        "tools": [{"name": "f", "description": "d", "input_schema": {"type": "object"}}],
        "tool_choice": {"type": "any"},
        "thinking": {"type": "disabled"},
        "stop_sequences": ["x"],
        "output_config": {"effort": "high", "format": {"type": "json_schema", "schema": {"type": "object"}}},
    }
    chat = anthropic_input.chat_body(body)
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    assert chat["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is f(1)?"},
        {"role": "assistant", "content": "Let me see.", "reasoning_content": "I call f.", "tool_calls": [call]},
        {"role": "tool", "content": "3", "tool_call_id": "c1"},
        {"role": "user", "content": "Well?"},
    ]
    function = {"name": "f", "description": "d", "parameters": {"type": "object"}}
    assert chat["tools"] == [{"type": "function", "function": function}]
    assert chat["tool_choice"] == "required"
    assert chat["chat_template_kwargs"] == {"enable_thinking": False}
    assert chat["reasoning_effort"] == "high"
    assert chat["response_format"]["json_schema"]["schema"] == {"type": "object"}
    assert chat["stop"] == ["x"]


@pytest.mark.parametrize(
    ("kind", "change", "says"),
    [
        (ResponseReply, {"input": [{"type": "item_reference", "id": "x"}]}, "item_reference"),
        (ResponseReply, {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "only text"),
        (ResponseReply, {"input": [1]}, "list of objects"),
        (ResponseReply, {"tools": [{"type": "web_search"}], "tool_choice": "required"}, "tool_choice needs tools"),
        (ResponseReply, {"include": ["everything"]}, "everything"),
        (ResponseReply, {"background": True}, "background"),
        (ResponseReply, {"truncation": "auto"}, "truncation"),
        (ResponseReply, {"text": 3}, "text must be an object"),
        (MessageReply, {"max_tokens": None}, "max_tokens is missing"),
        (MessageReply, {"tools": [{"type": "bash_1", "name": "bash"}]}, "bash_1"),
        (MessageReply, {"tool_choice": "auto"}, "tool_choice must be an object"),
        (MessageReply, {"output_config": {"format": {"type": "xml"}}}, "json_schema"),
        (MessageReply, {"mcp_servers": [1]}, "mcp_servers"),
        (ChatReply, {"messages": None}, "messages"),
        (ChatReply, {"stream_options": {}}, "needs stream"),
        (ChatReply, {"stream": True, "stream_options": {"more": 1}}, "unknown field more"),
        (ChatReply, {"stream": "yes"}, "true or false"),
        (ChatReply, {"model": 3}, "model must be a text"),
        (MessageReply, {"model": ["the-model"]}, "model must be a text"),
    ],
)
def test_what_is_not_served_is_refused(kind: type[Any], change: dict[str, Any], says: str) -> None:
    with pytest.raises((FieldError, ApiError, RequestError), match=says):
        kind(BODIES[kind] | change, SERVED)


def test_names_of_the_model() -> None:
    for name in (None, "", "the-model", "other"):
        assert SERVED.asked(name).name == (name or "the-model")
    assert SERVED.names == ["the-model", "other"]
    with pytest.raises(ApiError, match="ask for other or the-model") as caught:
        SERVED.asked("gpt-9")
    assert caught.value.status == 404
    anything = ServedModel("m", 0, frozenset("*"))
    assert anything.asked("gpt-9").name == "gpt-9"
    assert anything.names == ["m"]


def test_a_developer_is_the_system() -> None:
    (asked, _) = ChatReply({"messages": [{"role": "developer", "content": "Be brief."}, *USER]}, SERVED).asked[0]
    assert isinstance(asked, ChatPrompt)
    assert asked.messages[0]["role"] == "system"


# --- JSON and errors -----------------------------------------------------------------------------


def test_depth_is_counted_outside_of_texts() -> None:
    assert read_json_object(b'{"a": "' + b'[{\\"' * 5000 + b'\\\\"}')
    flat = json.dumps({"a": [[] for _ in range(500)], "b": [{"c": [1]}] * 300})
    assert read_json_object(flat.encode()) == json.loads(flat)
    deep = b'{"a":' * (MAX_DEPTH - 1) + b"{}" + b"}" * (MAX_DEPTH - 1)
    assert read_json_object(deep)
    for wrong in (b'{"a":' + deep + b"}", b'{"a": [' + b"[" * 500 + b"]" * 501 + b"}"):
        with pytest.raises(ApiError, match="levels"):
            read_json_object(wrong)


@dataclass
class Broken(Exception):
    secret: str = "/home/me"


def test_a_fault_tells_nothing_of_the_machine() -> None:
    told = api_error(Broken())
    assert (told.status, "/home/me" in str(told)) == (500, False)
    assert told.openai()["error"]["type"] == "server_error"
    assert told.anthropic()["error"]["type"] == "api_error"


def test_errors_have_the_types_of_each_protocol() -> None:
    for status, openai, anthropic in (
        (400, "invalid_request_error", "invalid_request_error"),
        (401, "authentication_error", "authentication_error"),
        (413, "invalid_request_error", "request_too_large"),
        (429, "rate_limit_error", "rate_limit_error"),
        (503, "server_error", "overloaded_error"),
    ):
        error = ApiError(status, "x")
        assert error.openai()["error"]["type"] == openai
        assert error.anthropic()["error"]["type"] == anthropic


# --- calls of tools ------------------------------------------------------------------------------

CALLS = (ToolCall("c1", "f", '{"x": 1}'), ToolCall("c2", "g", "{}"))
CALLING = [chunk("Let me see.", number=1), chunk(end="stop", number=2, tool_calls=CALLS)]


def test_calls_in_a_chat() -> None:
    told = events(ChatReply({"messages": USER, "stream": True}, SERVED), CALLING)
    last = told[-1]["choices"][0]
    assert last["finish_reason"] == "tool_calls"
    assert [(call["index"], call["id"], call["function"]["arguments"]) for call in last["delta"]["tool_calls"]] == [
        (0, "c1", '{"x": 1}'),
        (1, "c2", "{}"),
    ]
    whole = ChatReply({"messages": USER}, SERVED).whole([Completion.from_chunks(CALLING, ())])
    assert whole["choices"][0]["finish_reason"] == "tool_calls"
    assert [call["function"]["name"] for call in whole["choices"][0]["message"]["tool_calls"]] == ["f", "g"]


def test_calls_in_a_response() -> None:
    told = events(ResponseReply({"input": "Hi", "stream": True}, SERVED), CALLING)
    output = told[-1]["response"]["output"]
    assert [item["type"] for item in output] == ["message", "function_call", "function_call"]
    assert output[1]["arguments"] == '{"x": 1}'
    done = [event for event in told if event["type"] == "response.function_call_arguments.done"]
    assert [(event["output_index"], event["name"]) for event in done] == [(1, "f"), (2, "g")]
    whole = ResponseReply({"input": "Hi"}, SERVED).whole([Completion.from_chunks(CALLING, ())])
    assert [item["type"] for item in whole["output"]] == ["message", "function_call", "function_call"]


def test_calls_in_a_message() -> None:
    told = events(MessageReply({"messages": USER, "max_tokens": 9, "stream": True}, SERVED), CALLING)
    begun = [event["content_block"] for event in told if event["type"] == "content_block_start"]
    assert [(block["type"], block.get("name")) for block in begun] == [
        ("text", None),
        ("tool_use", "f"),
        ("tool_use", "g"),
    ]
    given = [
        event["delta"]["partial_json"] for event in told if event.get("delta", {}).get("type") == "input_json_delta"
    ]
    assert given == ['{"x": 1}', "{}"]
    assert told[-2]["delta"]["stop_reason"] == "tool_use"
    whole = MessageReply({"messages": USER, "max_tokens": 9}, SERVED).whole([Completion.from_chunks(CALLING, ())])
    assert [block.get("input") for block in whole["content"]] == [None, {"x": 1}, {}]


def test_tools_reach_the_prompt() -> None:
    function = {"name": "f", "parameters": {"type": "object"}}
    tools = [{"type": "function", "function": function}]
    bodies: list[tuple[type[Any], dict[str, Any]]] = [
        (ChatReply, {"tools": tools, "tool_choice": "required"}),
        (ResponseReply, {"tools": [{"type": "function", **function}], "tool_choice": "required"}),
        (MessageReply, {"tools": [{"name": "f", "input_schema": {"type": "object"}}], "tool_choice": {"type": "any"}}),
    ]
    for kind, more in bodies:
        (prompt, _) = kind(BODIES[kind] | more, SERVED).asked[0]
        assert [dict(tool) for tool in prompt.tools] == tools
        assert prompt.tool_choice == "required"
