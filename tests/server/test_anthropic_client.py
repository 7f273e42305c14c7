"""The server with Anthropic's own client, over a socket, against the library."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

from edgemoe import Completion, Sampling
from tests.support.running_server import NAME, RunningServer

QUESTION: Any = [{"role": "user", "content": "What is 48 + 31?"}]

GREEDY = {"temperature": 0}


@pytest.fixture
def client(server: RunningServer) -> Iterator[Any]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=60) as made:
        yield made


@pytest.fixture
def expected(server: RunningServer) -> Completion:
    return server.engine.generate(QUESTION, Sampling(temperature=0, max_tokens=24))


def error_type(error: anthropic.APIStatusError) -> str:
    body: Any = error.body
    return str(body["error"]["type"])


def ask(client: Any, **more: Any) -> Any:
    """A greedy message; the newest client has no argument for the temperature."""
    asked = {"model": NAME, "messages": QUESTION, "max_tokens": 24, "extra_body": {"temperature": 0}}
    return client.messages.create(**(asked | more))


def test_a_message_is_the_librarys(client: Any, expected: Completion) -> None:
    message = ask(client)
    assert [block.text for block in message.content] == [expected.text]
    assert (message.role, message.stop_reason, message.stop_sequence) == ("assistant", "end_turn", None)
    usage = message.usage
    assert usage.input_tokens + usage.cache_read_input_tokens == len(expected.prompt_token_ids)
    assert usage.output_tokens == len(expected.token_ids)


def test_a_streamed_message_is_the_whole_one(client: Any, expected: Completion) -> None:
    with client.messages.stream(model=NAME, messages=QUESTION, max_tokens=24, extra_body=GREEDY) as stream:
        kinds = [event.type for event in stream]
        message = stream.get_final_message()
    assert message.content[0].text == expected.text
    assert message.stop_reason == "end_turn"
    assert message.usage.output_tokens == len(expected.token_ids)
    own = [kind for kind in kinds if kind != "text"]
    assert own[:2] == ["message_start", "content_block_start"]
    assert own[-3:] == ["content_block_stop", "message_delta", "message_stop"]


def test_a_system_prompt_and_blocks_of_text(client: Any, server: RunningServer) -> None:
    blocks = [{"type": "text", "text": "What is "}, {"type": "text", "text": "2 + 2?"}]
    message = ask(
        client, system=[{"type": "text", "text": "Be brief."}], messages=[{"role": "user", "content": blocks}]
    )
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 2?"}]
    assert message.content[0].text == server.engine.generate(messages, Sampling(temperature=0, max_tokens=24)).text


def test_why_a_message_ended(client: Any) -> None:
    count: Any = [{"role": "user", "content": "Count from 1 to 9."}]
    stopped = ask(client, messages=count, stop_sequences=["9", "5"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "5")
    assert stopped.content[0].text == "1, 2, 3, 4, "
    assert ask(client, messages=count, max_tokens=2).stop_reason == "max_tokens"
    with client.messages.stream(
        model=NAME, messages=count, max_tokens=40, stop_sequences=["5"], extra_body=GREEDY
    ) as stream:
        assert stream.get_final_message().stop_sequence == "5"


def test_the_tokens_of_a_prompt_are_counted(client: Any, expected: Completion) -> None:
    counted = client.messages.count_tokens(model=NAME, messages=QUESTION)
    assert counted.input_tokens == len(expected.prompt_token_ids)
    # Also of what the context has no room for.
    said = {"role": "user", "content": "What is 48 + 31? " * 500}
    assert client.messages.count_tokens(model=NAME, messages=[said]).input_tokens > 2048


def test_the_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).type == "model"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"extra_body": {"temperature": -1}}, "temperature must be from 0"),
        ({"max_tokens": 0}, "max_tokens must be an integer from 1"),
        ({"messages": []}, "messages"),
        ({"messages": [*QUESTION, {"role": "assistant", "content": "It is"}]}, "not continued"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "the role 'wizard'"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "only text is served"),
        ({"thinking": 3}, "thinking must be an object"),
        ({"extra_body": {"wishes": 3}}, "unknown field wishes"),
    ],
)
def test_what_is_wrong_is_a_bad_request(client: Any, change: dict[str, Any], says: str) -> None:
    for stream in (False, True):
        with pytest.raises(anthropic.BadRequestError, match=says) as caught:
            ask(client, stream=stream, **change)
        assert error_type(caught.value) == "invalid_request_error"


def test_another_model_is_not_found(client: Any) -> None:
    with pytest.raises(anthropic.NotFoundError) as caught:
        ask(client, model="another")
    assert error_type(caught.value) == "not_found_error"
