"""The items of a response: whole and streamed ones are the same, with log-probabilities too."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from edgemoe import Chunk, Completion
from edgemoe.results import TokenLogprob, ToolCall
from edgemoe.server.protocols.openai_responses import ResponseReply
from edgemoe.server.protocols.reply import ServedModel
from tests.support.fake_engine import timings
from tests.support.running_server import RunningServer

SERVED = ServedModel("the-model", 1_700_000_000)
BODY = {"input": "Hi", "top_logprobs": 1}


def chunks(*parts: tuple[str, str], **last: Any) -> list[Chunk]:
    """Chunks of reasoning and text, each with a token's log-probability."""
    made = [
        Chunk(text, (number,), None, (TokenLogprob(number, str(number), -0.5, ()),), timings(7, number + 1), reasoning)
        for number, (reasoning, text) in enumerate(parts)
    ]
    return [*made[:-1], replace(made[-1], finish_reason="stop", **last)]


def told(reply: list[Chunk]) -> list[Any]:
    """The items at the end of a stream, and those of the whole reply, by type, text and tokens."""
    streamed = ResponseReply(BODY | {"stream": True}, SERVED)
    events = [*streamed.opening(), *(event for each in reply for event in streamed.chunk(0, each)), *streamed.closing()]
    final = json.loads(events[-1].decode().partition("data: ")[2])["response"]
    whole = ResponseReply(BODY, SERVED).whole([Completion.from_chunks(reply, ())])
    assert final["usage"] == whole["usage"]
    return [[_shape(item) for item in response["output"]] for response in (final, whole)]


def _shape(item: dict[str, Any]) -> tuple[str, str, str]:
    if item["type"] == "function_call":
        return "function_call", item["name"], ""
    (part,) = item["content"]
    return item["type"], part["text"], "".join(entry["token"] for entry in part.get("logprobs", ()))


CALLS = {"tool_calls": (ToolCall("c1", "f", "{}"),)}


@pytest.mark.parametrize(
    ("reply", "items"),
    [
        (
            chunks(("Let me", ""), (" see.", ""), ("", ""), ("", "It "), ("", ""), ("", "is 4.")),
            [("reasoning", "Let me see.", ""), ("message", "It is 4.", "012345")],
        ),
        (chunks(("", ""), ("", "é")), [("message", "é", "01")]),
        (chunks(("Let", ""), (" me", "")), [("reasoning", "Let me", ""), ("message", "", "01")]),
        (chunks(("", ""), ("", ""), **CALLS), [("message", "", "01"), ("function_call", "f", "")]),
    ],
)
def test_log_probabilities_cut_no_item_in_pieces(reply: list[Chunk], items: list[tuple[str, str, str]]) -> None:
    assert told(reply) == [items, items]


def test_a_whole_reply_tells_the_tokens_of_its_reasoning() -> None:
    reply = chunks(("Let me", ""), (" see.", ""), ("", ""), ("", "It is 4."))
    reply[:3] = [replace(each, reasons=True) for each in reply[:3]]
    completion = Completion.from_chunks(reply, ())
    assert completion.reasoning_tokens == 3
    usage = ResponseReply(BODY, SERVED).whole([completion])["usage"]
    assert usage["output_tokens_details"] == {"reasoning_tokens": 3}


def test_half_of_a_character_comes_back_as_a_question_mark(server: RunningServer) -> None:
    for stream in (False, True):
        asked = {"input": "Hi", "max_output_tokens": 1, "metadata": {"a": "\ud800b"}, "stream": stream}
        answer = server.raw(_request(json.dumps(asked).encode()))
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert b'"metadata":{"a":"?b"}' in answer


def _request(body: bytes) -> bytes:
    head = f"POST /v1/responses HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body
