"""The server with OpenAI's own client, over a socket, against the library."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from edgemoe import Completion, Sampling
from tests.support.running_server import NAME, RunningServer

QUESTION: Any = [{"role": "user", "content": "What is 48 + 31?"}]
GREEDY = Sampling(temperature=0, max_tokens=24)


@pytest.fixture
def client(server: RunningServer) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


@pytest.fixture
def expected(server: RunningServer) -> Completion:
    return server.engine.generate(QUESTION, GREEDY)


def test_a_chat_is_the_librarys(client: Any, expected: Completion) -> None:
    reply = client.chat.completions.create(model=NAME, messages=QUESTION, temperature=0, max_tokens=24)
    assert reply.choices[0].message.content == expected.text
    assert reply.choices[0].finish_reason == expected.finish_reason == "stop"
    assert reply.model == NAME
    usage = reply.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (
        len(expected.prompt_token_ids),
        len(expected.token_ids),
    )
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_a_streamed_chat_is_the_whole_one(client: Any, expected: Completion) -> None:
    stream = client.chat.completions.create(
        model=NAME, messages=QUESTION, temperature=0, max_tokens=24, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    *chunks, last = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected.text
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert last.choices == []
    assert last.usage.completion_tokens == len(expected.token_ids)
    assert len({chunk.id for chunk in [*chunks, last]}) == 1


def test_a_stream_has_no_usage_unless_it_is_asked_for(client: Any) -> None:
    stream = client.chat.completions.create(model=NAME, messages=QUESTION, max_tokens=2, stream=True)
    assert all(chunk.choices and chunk.usage is None for chunk in stream)


def test_several_choices_have_seeds_of_their_own(client: Any, server: RunningServer) -> None:
    reply = client.chat.completions.create(model=NAME, messages=QUESTION, n=3, seed=5, temperature=3.0, max_tokens=8)
    wanted = [
        server.engine.generate(QUESTION, Sampling(temperature=3.0, max_tokens=8, seed=5 + choice)).text
        for choice in range(3)
    ]
    assert [choice.message.content for choice in reply.choices] == wanted
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert reply.usage.completion_tokens == 24
    again = client.chat.completions.create(
        model=NAME, messages=QUESTION, n=3, seed=5, temperature=3.0, max_tokens=8, stream=True
    )
    texts = ["", "", ""]
    for chunk in again:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == wanted


def test_log_probabilities_are_the_librarys(client: Any, server: RunningServer) -> None:
    reply = client.chat.completions.create(
        model=NAME, messages=QUESTION, temperature=0, max_tokens=4, logprobs=True, top_logprobs=3
    )
    wanted = server.engine.generate(QUESTION, Sampling(temperature=0, max_tokens=4, logprobs=3)).logprobs
    assert wanted is not None
    got = reply.choices[0].logprobs.content
    assert [(entry.token, entry.logprob) for entry in got] == [(entry.token, entry.logprob) for entry in wanted]
    assert [len(entry.top_logprobs) for entry in got] == [3] * 4
    assert bytes(got[0].bytes).decode() == got[0].token


def test_completions_of_texts_and_token_ids(client: Any, server: RunningServer) -> None:
    prompts = ["The capital of Norway is", "The capital of Peru is"]
    ids = server.engine.tokenize(prompts[0])
    wanted = [server.engine.generate(prompt, Sampling(temperature=0, max_tokens=5)) for prompt in prompts]
    whole = client.completions.create(model=NAME, prompt=prompts, temperature=0, max_tokens=5)
    assert [choice.text for choice in whole.choices] == [each.text for each in wanted]
    assert whole.usage.prompt_tokens == sum(len(each.prompt_token_ids) for each in wanted)
    by_ids = client.completions.create(model=NAME, prompt=ids, temperature=0, max_tokens=5, logprobs=2)
    assert by_ids.choices[0].text == wanted[0].text
    logprobs = by_ids.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) == len(wanted[0].token_ids)
    streamed = client.completions.create(model=NAME, prompt=ids, temperature=0, max_tokens=5, logprobs=2, stream=True)
    chunks = [chunk.choices[0] for chunk in streamed]
    assert "".join(chunk.text for chunk in chunks) == wanted[0].text
    assert [offset for chunk in chunks for offset in chunk.logprobs.text_offset] == logprobs.text_offset


def test_a_stop_text_and_the_longest_reply(client: Any) -> None:
    count: Any = [{"role": "user", "content": "Count from 1 to 9."}]
    stopped = client.chat.completions.create(model=NAME, messages=count, temperature=0, stop=["5"])
    assert stopped.choices[0].message.content == "1, 2, 3, 4, "
    assert stopped.choices[0].finish_reason == "stop"
    cut = client.chat.completions.create(model=NAME, messages=count, temperature=0, max_completion_tokens=3)
    assert cut.choices[0].finish_reason == "length"
    assert cut.usage.completion_tokens == 3


def test_a_response_is_the_librarys(client: Any, expected: Completion) -> None:
    response = client.responses.create(model=NAME, input="What is 48 + 31?", temperature=0, max_output_tokens=24)
    assert response.output_text == expected.text
    assert (response.status, response.store) == ("completed", False)
    assert response.usage.output_tokens == len(expected.token_ids)
    cut = client.responses.create(model=NAME, input=QUESTION, temperature=0, max_output_tokens=2)
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")


def test_the_events_of_a_response_build_it(client: Any, expected: Completion) -> None:
    with client.responses.stream(model=NAME, input=QUESTION, temperature=0, max_output_tokens=24) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert final.output_text == expected.text
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"
    ]  # fmt: skip
    assert kinds[-4:] == [
        "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.completed"
    ]  # fmt: skip
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == expected.text


def test_log_probabilities_of_a_response(client: Any) -> None:
    include = ["message.output_text.logprobs"]
    response = client.responses.create(
        model=NAME, input=QUESTION, temperature=0, max_output_tokens=3, include=include, top_logprobs=2
    )
    logprobs = response.output[0].content[0].logprobs
    assert [len(entry.top_logprobs) for entry in logprobs] == [2, 2, 2]


def test_a_conversation_goes_on_with_the_items_of_a_response(client: Any, server: RunningServer) -> None:
    first = client.responses.create(model=NAME, input=QUESTION, temperature=0)
    following = [*QUESTION, *[item.model_dump() for item in first.output], {"role": "user", "content": "And 2 + 2?"}]
    second = client.responses.create(model=NAME, input=following, instructions="Be brief.", temperature=0)
    messages = [
        {"role": "system", "content": "Be brief."}, *QUESTION, {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "And 2 + 2?"},
    ]  # fmt: skip
    assert second.output_text == server.engine.generate(messages, Sampling(temperature=0)).text


def test_the_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "edgemoe"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"temperature": -1}, "temperature", "from 0"),
        ({"top_p": 2}, "top_p", "at most 1"),
        ({"n": 1000}, "n", "1 to 128"),
        ({"max_tokens": 0}, "max_tokens", "from 1"),
        ({"stop": [1]}, "stop", "text"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "by token id"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias", "outside the vocabulary"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"modalities": ["audio"]}, "modalities", "only"),
        ({"messages": []}, "messages", "at least one"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, None, "text"),
    ],
)
def test_what_is_wrong_is_a_bad_request(client: Any, change: dict[str, Any], param: str | None, says: str) -> None:
    for stream in (False, True):
        asked = {"model": NAME, "messages": QUESTION, "max_tokens": 4, "stream": stream} | change
        with pytest.raises(openai.BadRequestError, match=says) as caught:
            client.chat.completions.create(**asked)
        assert caught.value.type == "invalid_request_error"
        assert caught.value.param == param


def test_other_refusals(client: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="'gpt-9' is not served: ask for edgemoe-demo"):
        client.chat.completions.create(model="gpt-9", messages=QUESTION)
    with pytest.raises(openai.BadRequestError, match="unknown field wishes"):
        client.chat.completions.create(model=NAME, messages=QUESTION, extra_body={"wishes": 3})
    with pytest.raises(openai.BadRequestError, match="best_of"):
        client.completions.create(model=NAME, prompt="x", best_of=4)
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        client.responses.create(model=NAME, input="x", previous_response_id="resp_1")
    assert client.responses.create(model=NAME, input="x", store=True, max_output_tokens=2).store is False
    with pytest.raises(openai.NotFoundError, match="not stored"):
        client.responses.retrieve("resp_1")
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "x" * (1 << 20)}])
    assert caught.value.status_code == 413


def test_a_prompt_that_is_too_long(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgemoe.server.replying.FIRST_WAIT", 60)  # on a busy machine the count of tokens may take long
    long: Any = [{"role": "user", "content": "owl " * 5000}]
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="the context 2048") as caught:
            client.chat.completions.create(model=NAME, messages=long, stream=stream)
        assert caught.value.code == "context_length_exceeded"


def test_sixty_four_at_once_are_one_batch_and_say_what_single_ones_say(server: RunningServer) -> None:
    prompts = [f"Count from {number} to {number + 9}." for number in range(64)]
    wanted = [server.engine.generate([{"role": "user", "content": each}], GREEDY).text for each in prompts]
    before = server.engine.stats.steps

    async def all_at_once() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

            async def one(prompt: str, stream: bool) -> str:
                messages: Any = [{"role": "user", "content": prompt}]
                asked: Any = {"model": NAME, "messages": messages, "temperature": 0, "max_tokens": 24}
                if not stream:
                    return str((await client.chat.completions.create(**asked)).choices[0].message.content)
                text = ""
                async for chunk in await client.chat.completions.create(**asked, stream=True):
                    text += chunk.choices[0].delta.content or ""
                return text

            return await asyncio.gather(*(one(prompt, number % 2 == 0) for number, prompt in enumerate(prompts)))

    assert asyncio.run(all_at_once()) == wanted
    # One by one they would take a step for every token.
    assert server.engine.stats.steps - before < 64 * 24 / 4


def test_a_reply_has_the_form_that_is_asked_for(client: Any) -> None:
    schema = {
        "type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"],
        "additionalProperties": False,
    }  # fmt: skip
    form: Any = {"type": "json_schema", "json_schema": {"name": "sum", "schema": schema, "strict": True}}
    reply = client.chat.completions.create(
        model=NAME, messages=QUESTION, temperature=0, max_tokens=64, response_format=form
    )
    assert isinstance(json.loads(reply.choices[0].message.content)["sum"], int)
    text: Any = {"format": {"type": "json_schema", "name": "sum", "schema": schema, "strict": True}}
    response = client.responses.create(model=NAME, input=QUESTION, temperature=0, max_output_tokens=64, text=text)
    assert response.output_text == reply.choices[0].message.content
    with pytest.raises(openai.BadRequestError, match="response_format"):
        client.chat.completions.create(model=NAME, messages=QUESTION, response_format={"type": "xml"})


def test_tools_that_the_template_does_not_read_are_refused(client: Any) -> None:
    tools: Any = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    with pytest.raises(openai.BadRequestError, match="does not read tools"):
        client.chat.completions.create(model=NAME, messages=QUESTION, tools=tools)
