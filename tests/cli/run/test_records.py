from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from openai.types import Completion as OpenAICompletion
from openai.types.chat import ChatCompletion
from pydantic import BaseModel

from edgemoe import Completion
from edgemoe.cli.run.records import RECORD_START, failure, line_of, success
from edgemoe.cli.run.requests import BadLine, RequestLine
from edgemoe.results import TokenLogprob, ToolCall
from edgemoe.sampling import Sampling
from tests.support.fake_engine import timings

CHAT = RequestLine(custom_id="c", prompt=({"role": "user", "content": "Hi"},), is_chat=True, sampling=Sampling())
COMPLETION = RequestLine(custom_id="p", prompt="Once", sampling=Sampling())
LOGPROBS = (
    TokenLogprob(5, "Hé", -0.25, ((5, "Hé", -0.25), (6, "Ho", -2.0))),
    TokenLogprob(7, " there", -0.5, ()),
)


def answer(logprobs: tuple[TokenLogprob, ...] | None = None) -> Completion:
    return Completion("Hé there", (5, 7), "stop", logprobs, timings(4, 2), ())


def body(request: RequestLine, *given: Completion, has_tokenizer: bool = True) -> dict[str, Any]:
    record = success("batch_req_1", request, given, model="fake", has_tokenizer=has_tokenizer)
    assert set(record) == {"id", "custom_id", "response", "error"}
    assert (record["id"], record["custom_id"], record["error"]) == ("batch_req_1", request.custom_id, None)
    assert line_of(record).startswith(RECORD_START)
    assert record["response"]["status_code"] == 200
    assert record["response"]["request_id"]
    made: dict[str, Any] = record["response"]["body"]
    return made


def test_the_body_of_a_chat() -> None:
    made = body(CHAT, answer())
    assert made.pop("id").startswith("chatcmpl-")
    assert made.pop("created") > 1_700_000_000
    assert made == {
        "object": "chat.completion",
        "model": "fake",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hé there"},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 4, "completion_tokens": 2, "total_tokens": 6},
    }


def test_the_body_of_a_completion() -> None:
    made = body(COMPLETION, answer())
    assert made["object"] == "text_completion"
    assert made["id"].startswith("cmpl-")
    assert made["choices"] == [{"index": 0, "text": "Hé there", "logprobs": None, "finish_reason": "stop"}]


@pytest.mark.parametrize("request_", [CHAT, COMPLETION])
def test_several_choices_share_one_prompt(request_: RequestLine) -> None:
    other = Completion("Hi", (9,), "length", None, timings(4, 1), ())
    made = body(request_, answer(), other)
    assert [(choice["index"], choice["finish_reason"]) for choice in made["choices"]] == [(0, "stop"), (1, "length")]
    texts = [choice["text"] if "text" in choice else choice["message"]["content"] for choice in made["choices"]]
    assert texts == ["Hé there", "Hi"]
    assert made["usage"] == {"prompt_tokens": 4, "completion_tokens": 3, "total_tokens": 7}


def test_without_a_tokenizer_the_token_ids_are_the_answer() -> None:
    assert body(COMPLETION, answer(), has_tokenizer=False)["choices"][0]["token_ids"] == [5, 7]


def test_logprobs_have_the_shape_of_their_endpoint() -> None:
    first = {"token": "Hé", "logprob": -0.25, "bytes": [72, 195, 169]}
    assert body(CHAT, answer(LOGPROBS))["choices"][0]["logprobs"] == {
        "content": [
            {**first, "top_logprobs": [first, {"token": "Ho", "logprob": -2.0, "bytes": [72, 111]}]},
            {"token": " there", "logprob": -0.5, "bytes": list(b" there"), "top_logprobs": []},
        ]
    }
    assert body(COMPLETION, answer(LOGPROBS))["choices"][0]["logprobs"] == {
        "tokens": ["Hé", " there"],
        "token_logprobs": [-0.25, -0.5],
        "top_logprobs": [{"Hé": -0.25, "Ho": -2.0}, {}],
        "text_offset": [0, 2],
    }


def test_a_failure() -> None:
    assert failure("batch_req_2", BadLine("a", "invalid_json", "line 3 is not JSON")) == {
        "id": "batch_req_2",
        "custom_id": "a",
        "response": None,
        "error": {"code": "invalid_json", "message": "line 3 is not JSON"},
    }


def test_a_line_can_always_be_written() -> None:
    assert line_of({"a": "é\n\ud800"}) == '{"a": "é\\n?"}\n'.encode()


# --- OpenAI's own types --------------------------------------------------------------------------


def foreign(model: BaseModel, path: str = "") -> list[str]:
    """The fields that the types do not know, at any depth."""
    found = [f"{path}{name}" for name in model.model_extra or ()]
    for name in type(model).model_fields:
        value = getattr(model, name)
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, BaseModel):
                found += foreign(each, f"{path}{name}.")
    return found


@pytest.mark.parametrize("logprobs", [None, LOGPROBS])
@pytest.mark.parametrize(("request_", "shape"), [(CHAT, ChatCompletion), (COMPLETION, OpenAICompletion)])
def test_the_body_has_openai_s_shape(
    request_: RequestLine, shape: type[BaseModel], logprobs: tuple[TokenLogprob, ...] | None
) -> None:
    made = body(request_, answer(logprobs), answer(logprobs))
    read = shape.model_validate(json.loads(line_of(made)), strict=True)
    assert foreign(read) == []
    assert read.model_dump(exclude_unset=True) == made


def test_tokens_with_one_text_keep_their_own_probabilities() -> None:
    """As several bytes that are each a part of a character."""
    part = "\N{REPLACEMENT CHARACTER}"
    top = ((5, part, -0.5), (6, part, -1.5), (7, "a", -2.5))
    shape = body(COMPLETION, answer((TokenLogprob(6, part, -1.5, top),)))["choices"][0]["logprobs"]
    assert shape["tokens"] == ["token_id:6"]
    assert shape["top_logprobs"] == [{"token_id:5": -0.5, "token_id:6": -1.5, "a": -2.5}]


def test_a_token_that_is_not_among_the_likeliest_is_no_other_one() -> None:
    shape = body(COMPLETION, answer((TokenLogprob(9, "a", -4.5, ((7, "a", -2.5),)),)))["choices"][0]["logprobs"]
    assert shape["tokens"] == ["token_id:9"]
    assert shape["top_logprobs"] == [{"token_id:7": -2.5}]


def test_one_call_at_most() -> None:
    calls = tuple(ToolCall(f"call_{name}", name, "{}") for name in ("add", "sub"))
    given = replace(answer(), tool_calls=calls)
    for request, names in ((CHAT, ["add", "sub"]), (replace(CHAT, one_call=True), ["add"])):
        message = body(request, given)["choices"][0]["message"]
        assert [call["function"]["name"] for call in message["tool_calls"]] == names
