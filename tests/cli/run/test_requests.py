from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from edgemoe.checkpoint.chat_template import ChatPrompt
from edgemoe.cli.run.requests import BadLine, RequestLine, RequestReader
from edgemoe.cli.run.source import Line
from edgemoe.sampling import Sampling

PLAIN = RequestReader(Sampling())


def read(*texts: str, reader: RequestReader = PLAIN, jsonl: bool = False) -> list[RequestLine | BadLine]:
    lines = [Line(number, text) for number, text in enumerate(texts, 1)]
    return [entry.request for entry in reader.read(lines, jsonl=jsonl)]


def one(entry: Any, reader: RequestReader = PLAIN) -> RequestLine:
    (request,) = read(json.dumps(entry), reader=reader, jsonl=True)
    assert isinstance(request, RequestLine), request
    return request


def refused(entry: Any) -> BadLine:
    (bad,) = read(entry if isinstance(entry, str) else json.dumps(entry), jsonl=True)
    assert isinstance(bad, BadLine), bad
    return bad


def batch(url: str = "/v1/chat/completions", **body: Any) -> dict[str, Any]:
    return {"custom_id": "a", "method": "POST", "url": url, "body": body}


TOOL = {"type": "function", "function": {"name": "f"}}
USER = {"role": "user", "content": "Hi"}


def chat(custom_id: str, *messages: dict[str, str], sampling: Sampling = PLAIN.defaults) -> RequestLine:
    return RequestLine(custom_id=custom_id, prompt=messages, is_chat=True, sampling=sampling)


def test_plain_lines_are_messages_with_a_chat_template_and_prompts_without() -> None:
    assert read("Hello", "two  words ") == [
        RequestLine(
            custom_id="line-1", prompt=({"role": "user", "content": "Hello"},), is_chat=True, sampling=Sampling()
        ),
        RequestLine(
            custom_id="line-2", prompt=({"role": "user", "content": "two  words "},), is_chat=True, sampling=Sampling()
        ),
    ]
    raw = RequestReader(Sampling(), chat_lines=False)
    assert read("Hello", reader=raw) == [RequestLine(custom_id="line-1", prompt="Hello", sampling=Sampling())]


def test_the_first_line_decides_what_the_others_are() -> None:
    bad = read('{"prompt": "a"}', "plain")[1]
    assert isinstance(bad, BadLine)
    assert (bad.custom_id, bad.code) == ("line-2", "invalid_json")
    text = read("plain", '{"prompt": "a"}')[1]
    assert isinstance(text, RequestLine)
    assert text.prompt == ({"role": "user", "content": '{"prompt": "a"}'},)
    assert isinstance(read("plain", jsonl=True)[0], BadLine)
    assert read("plain", jsonl=False) != read("plain", jsonl=True)


def test_an_openai_batch_line() -> None:
    request = one(batch(messages=[USER], model="ignored", temperature=0.5, max_tokens=3, n=1, stream=False))
    assert request == RequestLine(
        custom_id="a", prompt=(USER,), is_chat=True, sampling=Sampling(temperature=0.5, max_tokens=3)
    )
    completion = one(batch("/v1/completions", prompt="Once", logprobs=2))
    assert completion == RequestLine(custom_id="a", prompt="Once", sampling=Sampling(logprobs=2))


def test_short_lines() -> None:
    assert one({"prompt": "Once"}) == RequestLine(custom_id="line-1", prompt="Once", sampling=Sampling())
    assert one({"prompt": [1, 2, 3], "id": "ids"}) == RequestLine(
        custom_id="ids", prompt=(1, 2, 3), sampling=Sampling()
    )
    assert one({"messages": [USER], "custom_id": "c"}) == RequestLine(
        custom_id="c", prompt=(USER,), is_chat=True, sampling=Sampling()
    )


def test_every_sampling_field_overrides_the_command_line() -> None:
    defaults = Sampling(temperature=1.0, max_tokens=100, stop=("X",), ignore_eos=True, seed=1, logprobs=4)
    fields = {
        "temperature": 0, "top_k": 3, "top_p": 0.5, "min_p": 0.1, "repetition_penalty": 1.5, "seed": 9,
        "stop": ["a", "b"], "max_tokens": 7, "ignore_eos": False, "logprobs": 0,
    }  # fmt: skip
    assert one({"prompt": "p", **fields}, RequestReader(defaults)).sampling == Sampling(
        **{**fields, "stop": ("a", "b")}  # type: ignore[arg-type]
    )
    assert one({"prompt": "p", "temperature": None, "stop": None}, RequestReader(defaults)).sampling == defaults


def test_the_two_names_of_the_length() -> None:
    assert one({"messages": [USER], "max_completion_tokens": 4}).sampling.max_tokens == 4
    assert "are the same thing" in refused({"messages": [USER], "max_completion_tokens": 4, "max_tokens": 4}).message


def test_several_choices_count_up_from_the_seed() -> None:
    assert one({"prompt": "p", "n": 3}).samplings() == [Sampling()] * 3
    seeded = one({"messages": [USER], "n": 3, "seed": 2**63 - 2, "top_k": 5}).samplings()
    assert [sampling.seed for sampling in seeded] == [2**63 - 2, 2**63 - 1, 0]
    assert all(sampling.top_k == 5 for sampling in seeded)
    assert one({"prompt": "p", "n": None, "best_of": 1}).choices == 1


def test_openais_penalties_and_bias_are_taken() -> None:
    entry = {"prompt": "p", "presence_penalty": 0.5, "frequency_penalty": -1, "logit_bias": {"50": -100}}
    assert one(entry).sampling == Sampling(presence_penalty=0.5, frequency_penalty=-1.0, logit_bias={50: -100.0})


def test_fields_that_ask_for_nothing_are_taken() -> None:
    shared: dict[str, Any] = {
        "stream": False, "stream_options": None,
        "user": "someone", "metadata": {"a": "b"}, "safety_identifier": "s", "prompt_cache_key": "k", "model": "m",
    }  # fmt: skip
    chats: dict[str, Any] = {
        "response_format": {"type": "text"}, "modalities": ["text"], "tools": [], "tool_choice": "auto",
        "parallel_tool_calls": True, "store": False, "service_tier": "auto",
    }  # fmt: skip
    plain = chat("a", USER)
    assert one(batch(messages=[USER], **shared, **chats)) == plain
    unset: dict[str, Any] = dict.fromkeys([*shared, *chats])
    assert one(batch(messages=[USER], **unset)) == plain
    reply: dict[str, Any] = {
        "refusal": None, "tool_calls": None, "annotations": [], "audio": None, "function_call": None,
    }  # fmt: skip
    assert one(batch(messages=[{**USER, **reply}])) == plain
    completion = one(batch("/v1/completions", prompt="p", **shared, echo=False, suffix=None, n=2, best_of=2))
    assert completion == RequestLine(custom_id="a", prompt="p", sampling=Sampling(), choices=2)


def test_tools_and_a_form_are_taken() -> None:
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer"}}}
    calls = [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    messages: list[dict[str, Any]] = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c", "content": "7"},
    ]
    choice = {"type": "function", "function": {"name": "f"}}
    found = one(batch(messages=messages, response_format=form, tools=[TOOL], tool_choice=choice))
    assert found.sampling == Sampling(response_format=form)
    assert found.asked == ChatPrompt(tuple(messages), {}, tools=[TOOL], tool_choice=choice)
    assert one(batch("/v1/completions", prompt="p", response_format=form)).sampling.response_format == form


@pytest.mark.parametrize(
    ("fields", "logprobs"),
    [
        ({}, 5),
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 3}, 3),
        ({"logprobs": False}, None),
        ({"logprobs": None, "top_logprobs": None}, 5),
    ],
)
def test_logprobs_of_a_chat(fields: dict[str, Any], logprobs: int | None) -> None:
    reader = RequestReader(Sampling(logprobs=5))
    assert one({"messages": [USER], **fields}, reader).sampling.logprobs == logprobs


def test_the_system_prompt_goes_before_chats_that_have_none() -> None:
    reader = RequestReader(Sampling(), system="Be brief.")
    system = {"role": "system", "content": "Be brief."}
    own = {"role": "system", "content": "Be long."}
    assert one({"messages": [USER]}, reader).prompt == (system, USER)
    assert one({"messages": [own, USER]}, reader).prompt == (own, USER)
    assert one({"prompt": "p"}, reader) == RequestLine(custom_id="line-1", prompt="p", sampling=Sampling())
    text = read("Hi", reader=reader)[0]
    assert isinstance(text, RequestLine)
    assert text.prompt == (system, USER)


def test_content_may_be_text_parts() -> None:
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    assert one({"messages": [{"role": "user", "content": parts}]}).prompt == (USER,)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("{", "line 1 is not JSON"),
        ('{"prompt": "p", "temperature": NaN}', "NaN is no JSON number"),
        ("[1]", "line 1 is JSON but no object"),
        ("[" * 100_000, "line 1 has too many brackets inside of one another"),
        ('{"a":' * 100_000, "line 1 has too many brackets inside of one another"),
        ('{"prompt": "a", "prompt": "b"}', "line 1 is not JSON: the name 'prompt' is there twice in an object"),
        ('{"prompt": "a", "logit_bias": {"1": 1, "1": 2}}', "the name '1' is there twice"),
        ('{"seed": ' + "1" * 5000 + "}", "line 1 is not JSON: a number has too many digits"),
    ],
)
def test_lines_that_are_no_json_object(entry: str, said: str) -> None:
    bad = refused(entry)
    assert (bad.custom_id, bad.code) == ("line-1", "invalid_json")
    assert said in bad.message


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"promt": "p"}, "give either prompt or messages"),
        ({"prompt": "p", "messages": [USER]}, "give either prompt or messages"),
        ({"prompt": "p", "tempurature": 1, "top-k": 2}, "unknown fields tempurature, top-k; known are"),
        ({"prompt": "p", "top_logprobs": 2}, "unknown field top_logprobs"),
        ({"prompt": "p", "n": 0}, "n is 0; give 1 to 128"),
        ({"messages": [USER], "n": 129}, "n is 129; give 1 to 128"),
        ({"prompt": "p", "n": True}, "n must be a whole number"),
        ({"prompt": "p", "n": 2, "best_of": 3}, "best_of is 3, but only as many as n (2) are served"),
        ({"prompt": "p", "best_of": True}, "best_of is true, but only as many as n (1)"),
        ({"prompt": "p", "stream": True}, "stream is true, but only false or null is served; leave it out"),
        ({"prompt": "p", "stream": 0}, "stream is 0, but"),
        ({"prompt": "p", "echo": True}, "echo is true, but only false or null is served"),
        ({"prompt": "p", "presence_penalty": 2.5}, "presence_penalty must be from -2 to 2, not 2.5"),
        ({"prompt": "p", "logit_bias": {"a": 1}}, "logit_bias must be numbers from -100 to 100 by token id"),
        ({"prompt": "p", "presence_penalty": False}, "presence_penalty must be a number"),
        ({"prompt": "p", "user": "u", "usr": "u"}, "unknown field usr"),
        ({"messages": [USER], "response_format": {"type": "yaml"}}, "response_format must be an object whose type"),
        ({"prompt": "p", "response_format": {"type": "json_schema"}}, 'with the schema under "schema"'),
        ({"messages": [USER], "tools": [{"type": "function", "function": {"name": "f" * 129}}]}, "1 to 128 letters"),
        ({"messages": [USER], "tools": {"a": 1}}, "tools must be a list"),
        ({"messages": [USER], "tools": [TOOL, TOOL]}, "two functions of the name f"),
        ({"messages": [USER], "tools": [{"type": "retrieval"}]}, "not 'retrieval'"),
        ({"messages": [USER], "tool_choice": "required"}, "tool_choice needs tools"),
        ({"messages": [USER], "tools": [TOOL], "tool_choice": "some"}, "tool_choice must be"),
        ({"messages": [USER], "tools": [TOOL], "parallel_tool_calls": 0}, "parallel_tool_calls must be true or false"),
        ({"prompt": "p", "tools": [TOOL]}, "unknown field tools"),
        ({"messages": [{"role": "assistant", "tool_calls": [1]}]}, "must be functions with a name"),
        ({"messages": [{"role": "tool", "content": "1", "tool_call_id": 3}]}, "tool_call_id of a message must be"),
        ({"messages": [USER], "stream_options": {}}, "stream_options is {}, but only null is served"),
        ({"messages": [{**USER, "tool_calls": [1]}]}, "tool_calls is [1], but only [] or null is served"),
        ({"messages": [{**USER, "tool_call_id": "a"}]}, "unknown field tool_call_id"),
        ({"prompt": "p", "temperature": "hot"}, 'temperature must be a number, not "hot"'),
        ({"prompt": "p", "temperature": True}, "temperature must be a number"),
        ({"prompt": "p", "temperature": 10**400}, "temperature is too large"),
        ({"prompt": "p", "temperature": -1}, "temperature"),
        ({"prompt": "p", "max_tokens": 1.5}, "max_tokens must be a whole number, not 1.5"),
        ({"prompt": "p", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "p", "ignore_eos": 1}, "ignore_eos must be true or false"),
        ({"prompt": "p", "stop": 3}, "stop must be a text or a list of texts"),
        ({"prompt": "p", "stop": ["a", 3]}, "stop must be a text"),
        ({"prompt": "p", "logprobs": True}, "logprobs must be a whole number"),
        ({"messages": [USER], "logprobs": 2}, "logprobs must be true or false"),
        ({"messages": [USER], "top_logprobs": 2}, "top_logprobs needs logprobs to be true"),
        ({"prompt": ["a", "b"]}, "prompt must be one text or one list of token ids"),
        ({"prompt": [1, True]}, "prompt must be one text or one list of token ids"),
        ({"prompt": None}, "prompt must be one text"),
        ({"prompt": "\ud800"}, "lone surrogate"),
        ({"messages": []}, "at least one message"),
        ({"messages": ["Hi"]}, "an object with role and content"),
        ({"messages": [{"role": "user"}]}, "content must be a text"),
        ({"messages": [{**USER, "name": 3}]}, "name must be a text, not 3"),
        (
            {"messages": [{**USER, "user": "Al"}]},
            "unknown field user; known are content, name, reasoning_content, refusal, role",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "text parts only"),
        ({"prompt": "p", "custom_id": 7.5}, "custom_id must be a text or a whole number"),
        ({"prompt": "p", "id": True}, "id must be a text or a whole number"),
        ({"prompt": "p", "custom_id": "a", "id": "b"}, "the same thing"),
        (batch("/v1/embeddings", input="x"), "url '/v1/embeddings' is not served; give /v1/chat/completions"),
        ({**batch(messages=[USER]), "method": "GET"}, "method 'GET' is not served; give POST"),
        ({**batch(messages=[USER]), "body": [1]}, "body must be an object"),
        ({**batch(messages=[USER]), "model": "m"}, "unknown field model"),
        (batch(prompt="p"), "messages is missing"),
        (batch("/v1/completions", messages=[USER]), "prompt is missing"),
        (batch(messages=[USER], best_of=1), "unknown field best_of"),
    ],
)
def test_what_a_line_may_not_say(entry: dict[str, Any], said: str) -> None:
    bad = refused(entry)
    assert bad.code == "invalid_request"
    assert bad.message.startswith("line 1: ")
    assert said in bad.message


def test_a_bad_line_keeps_its_id_where_it_has_one() -> None:
    assert refused(batch(messages=[USER], n=0)).custom_id == "a"
    assert refused({"prompt": "p", "id": "b", "n": 0}).custom_id == "b"
    assert refused({"prompt": "p", "custom_id": "\ud800"}).custom_id == "line-1"


def test_lines_are_read_only_as_requests_are_taken() -> None:
    taken = []

    def lines() -> Iterator[Line]:
        for number in range(1, 4):
            taken.append(number)
            yield Line(number, "text")

    requests = PLAIN.read(lines(), jsonl=False)
    next(requests)
    assert taken == [1]
