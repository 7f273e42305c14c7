from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from edgemoe.cli.requests import BadLine, Request, RequestReader
from edgemoe.cli.source import Line
from edgemoe.sampling import Sampling

PLAIN = RequestReader(Sampling())


def read(*texts: str, reader: RequestReader = PLAIN, jsonl: bool = False) -> list[Request | BadLine]:
    return list(reader.read([Line(number, text) for number, text in enumerate(texts, 1)], jsonl=jsonl))


def one(entry: Any, reader: RequestReader = PLAIN) -> Request:
    (request,) = read(json.dumps(entry), reader=reader, jsonl=True)
    assert isinstance(request, Request), request
    return request


def refused(entry: Any) -> BadLine:
    (bad,) = read(entry if isinstance(entry, str) else json.dumps(entry), jsonl=True)
    assert isinstance(bad, BadLine), bad
    return bad


def batch(url: str = "/v1/chat/completions", **body: Any) -> dict[str, Any]:
    return {"custom_id": "a", "method": "POST", "url": url, "body": body}


USER = {"role": "user", "content": "Hi"}


def test_plain_lines_are_messages_with_a_chat_template_and_prompts_without() -> None:
    assert read("Hello", "two  words ") == [
        Request(custom_id="line-1", messages=({"role": "user", "content": "Hello"},), sampling=Sampling()),
        Request(custom_id="line-2", messages=({"role": "user", "content": "two  words "},), sampling=Sampling()),
    ]
    raw = RequestReader(Sampling(), chat_lines=False)
    assert read("Hello", reader=raw) == [Request(custom_id="line-1", prompt="Hello", sampling=Sampling())]


def test_the_first_line_decides_what_the_others_are() -> None:
    bad = read('{"prompt": "a"}', "plain")[1]
    assert isinstance(bad, BadLine)
    assert (bad.custom_id, bad.code) == ("line-2", "invalid_json")
    text = read("plain", '{"prompt": "a"}')[1]
    assert isinstance(text, Request)
    assert text.messages == ({"role": "user", "content": '{"prompt": "a"}'},)
    assert isinstance(read("plain", jsonl=True)[0], BadLine)
    assert read("plain", jsonl=False) != read("plain", jsonl=True)


def test_an_openai_batch_line() -> None:
    request = one(batch(messages=[USER], model="ignored", temperature=0.5, max_tokens=3, n=1, stream=False))
    assert request == Request(custom_id="a", messages=(USER,), sampling=Sampling(temperature=0.5, max_tokens=3))
    completion = one(batch("/v1/completions", prompt="Once", logprobs=2))
    assert completion == Request(custom_id="a", prompt="Once", sampling=Sampling(logprobs=2))


def test_short_lines() -> None:
    assert one({"prompt": "Once"}) == Request(custom_id="line-1", prompt="Once", sampling=Sampling())
    assert one({"prompt": [1, 2, 3], "id": "ids"}) == Request(custom_id="ids", prompt=(1, 2, 3), sampling=Sampling())
    assert one({"messages": [USER], "custom_id": "c"}) == Request(custom_id="c", messages=(USER,), sampling=Sampling())


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
    assert one({"messages": [USER]}, reader).messages == (system, USER)
    assert one({"messages": [own, USER]}, reader).messages == (own, USER)
    assert one({"prompt": "p"}, reader) == Request(custom_id="line-1", prompt="p", sampling=Sampling())
    text = read("Hi", reader=reader)[0]
    assert isinstance(text, Request)
    assert text.messages == (system, USER)


def test_content_may_be_text_parts() -> None:
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    assert one({"messages": [{"role": "user", "content": parts}]}).messages == (USER,)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("{", "line 1 is not JSON"),
        ('{"prompt": "p", "temperature": NaN}', "NaN is no JSON number"),
        ("[1]", "line 1 is JSON but no object"),
        ("[" * 100_000, "line 1 is not JSON"),
        ('{"seed": ' + "1" * 5000 + "}", "line 1 is not JSON"),
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
        ({"prompt": "p", "n": 2}, "n is 2, but only 1 is served"),
        ({"prompt": "p", "n": True}, "n is True"),
        ({"prompt": "p", "stream": True}, "stream must be false"),
        ({"prompt": "p", "temperature": "hot"}, "temperature must be a number"),
        ({"prompt": "p", "temperature": True}, "temperature must be a number"),
        ({"prompt": "p", "temperature": 10**400}, "temperature is too large"),
        ({"prompt": "p", "temperature": -1}, "temperature"),
        ({"prompt": "p", "max_tokens": 1.5}, "max_tokens must be a whole number"),
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
        ({"messages": [{**USER, "name": "Al"}]}, "unknown field name"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "text parts only"),
        ({"prompt": "p", "custom_id": 7}, "custom_id must be a text"),
        ({"prompt": "p", "custom_id": "a", "id": "b"}, "the same thing"),
        (batch("/v1/embeddings", input="x"), "url '/v1/embeddings' is not served; give /v1/chat/completions"),
        ({**batch(messages=[USER]), "method": "GET"}, "method 'GET' is not served; give POST"),
        ({**batch(messages=[USER]), "body": [1]}, "body must be an object"),
        ({**batch(messages=[USER]), "model": "m"}, "unknown field model"),
        (batch(prompt="p"), "messages is missing"),
        (batch("/v1/completions", messages=[USER]), "prompt is missing"),
        (batch(messages=[USER], presence_penalty=1), "unknown field presence_penalty"),
    ],
)
def test_what_a_line_may_not_say(entry: dict[str, Any], said: str) -> None:
    bad = refused(entry)
    assert bad.code == "invalid_request"
    assert bad.message.startswith("line 1: ")
    assert said in bad.message


def test_a_bad_line_keeps_its_id_where_it_has_one() -> None:
    assert refused(batch(messages=[USER], n=3)).custom_id == "a"
    assert refused({"prompt": "p", "id": "b", "n": 3}).custom_id == "b"
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
