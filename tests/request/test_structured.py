"""Replies in a given form, and calls of tools, from a whole engine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest

from edgemoe import ChatPrompt, Engine, RequestError, Sampling
from edgemoe.cli.main import main
from edgemoe.demo import demo_folder

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "population": {"type": "integer", "minimum": 0, "maximum": 9999},
        "tags": {"type": "array", "items": {"enum": ["old", "new"]}, "maxItems": 2},
    },
    "required": ["city", "population", "tags"],
    "additionalProperties": False,
}
FORM = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA, "strict": True}}
TALK = [{"role": "user", "content": "What is the capital of Norway?"}]
TOOL = {"type": "function", "function": {"name": "describe", "parameters": SCHEMA}}
TOOL_TEMPLATE = (
    "{{ bos_token }}{% if tools %}<|system|>Answer with <tool_call>{{ tools | tojson }}</tool_call><|end|>{% endif %}"
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@pytest.fixture(scope="module")
def demo() -> Iterator[Engine]:
    with Engine.load(threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model with a template that reads tools."""
    made = tmp_path_factory.mktemp("caller") / "model"
    shutil.copytree(demo_folder(), made)
    (made / "chat_template.jinja").write_text(TOOL_TEMPLATE)
    return made


@pytest.fixture(scope="module")
def caller(folder: Path) -> Iterator[Engine]:
    # In bf16 a long prompt that is cached in part may have other last bits, which choose among numbers without a sense.
    with Engine.load(folder, threads=1, dtype="float32") as loaded:
        yield loaded


def check(text: str) -> None:
    jsonschema.validate(json.loads(text), SCHEMA)


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"temperature": 1.0, "seed": 5}], ids=str)
def test_a_reply_of_a_model_that_knows_no_json_is_json(demo: Engine, settings: dict[str, Any]) -> None:
    asked = Sampling(response_format=FORM, max_tokens=400, **settings)
    reply = demo.generate(TALK, asked)
    assert reply.finish_reason == "stop"
    check(reply.text)
    assert "".join(chunk.text for chunk in demo.stream(TALK, asked)) == reply.text
    message = demo.chat(TALK, asked)["choices"][0]["message"]
    assert message == {"role": "assistant", "content": reply.text}
    with Engine.load(threads=1, speculate="off") as plain:
        assert plain.generate(TALK, asked).token_ids == reply.token_ids


def test_a_batch_may_mix_forms(demo: Engine) -> None:
    free, formed = Sampling(temperature=0, max_tokens=12), Sampling(temperature=0, max_tokens=400, response_format=FORM)
    alone = demo.generate(TALK, free)
    found = dict(demo.generate_batch([(TALK, free), (TALK, formed), ("Hello", formed), (TALK, free)]))
    replies = [reply for _, reply in sorted(found.items())]
    texts = [reply.text for reply in replies if not isinstance(reply, RequestError)]
    assert len(texts) == 4
    assert texts[0] == texts[3] == alone.text
    check(texts[1])
    check(texts[2])


def test_a_form_that_nothing_has_fails_its_request_alone(demo: Engine) -> None:
    empty = Sampling(response_format={"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}})
    free = Sampling(temperature=0, max_tokens=12)
    with pytest.raises(RequestError, match="response_format"):
        demo.generate(TALK, empty)
    found = dict(demo.generate_batch([(TALK, free), (TALK, empty)]))
    assert isinstance(found[1], RequestError)
    assert not isinstance(found[0], RequestError)


def test_tools_of_a_template_without_them_are_refused(demo: Engine) -> None:
    with pytest.raises(RequestError, match="does not read tools"):
        demo.generate(ChatPrompt(TALK, tools=[TOOL]))


def test_a_tool_is_called_where_one_must_be(caller: Engine) -> None:
    prompt = ChatPrompt(TALK, tools=[TOOL], tool_choice="required")
    asked = Sampling(temperature=0, max_tokens=400)
    (call,) = caller.generate(prompt, asked).tool_calls
    assert call.name == "describe"
    check(call.arguments)
    chunks = list(caller.stream(prompt, asked))
    assert [call.arguments for call in chunks[-1].tool_calls] == [call.arguments]
    choice = caller.chat(prompt, asked)["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "describe", "arguments": call.arguments}
    last = list(caller.chat_stream(prompt, asked))[-1]["choices"][0]
    assert last["finish_reason"] == "tool_calls"
    assert last["delta"]["tool_calls"][0]["function"]["arguments"] == call.arguments
    assert last["delta"]["tool_calls"][0]["index"] == 0


def test_a_run_has_forms_and_calls_in_its_records(folder: Path, tmp_path: Path) -> None:
    lines = [
        {"custom_id": "form", "messages": TALK, "response_format": FORM, "max_tokens": 400, "temperature": 0},
        {"custom_id": "call", "messages": TALK, "tools": [TOOL], "tool_choice": "required", "max_tokens": 400},
        {"custom_id": "bad", "messages": TALK, "response_format": {"type": "json_schema", "json_schema": {}}},
    ]
    asked, answered = tmp_path / "asked.jsonl", tmp_path / "answered.jsonl"
    asked.write_text("".join(json.dumps(line) + "\n" for line in lines))
    main(["run", str(asked), "-o", str(answered), "-m", str(folder)])
    records = {record["custom_id"]: record for record in map(json.loads, answered.read_text().splitlines())}
    check(records["form"]["response"]["body"]["choices"][0]["message"]["content"])
    choice = records["call"]["response"]["body"]["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    check(choice["message"]["tool_calls"][0]["function"]["arguments"])
    assert "response_format" in records["bad"]["error"]["message"]
