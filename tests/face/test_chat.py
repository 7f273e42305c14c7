from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.support.byte_tokenizer import with_tokenizer
from edgemoe import Engine, RequestError, Sampling

TALK = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def engine(talker: Path) -> Iterator[Engine]:
    with Engine.load(talker, expert_cache="25%", threads=1) as loaded:
        yield loaded


def test_a_conversation_becomes_the_templates_tokens(engine: Engine) -> None:
    assert engine.has_tokenizer
    assert engine.has_chat_template
    talk = [*TALK, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "Ä"}]
    text = "<user>Hi<assistant>Yes?<user>Ä<assistant>"
    assert bytes(token - 3 for token in engine.chat_prompt(talk)).decode() == text


def test_a_reply_has_the_shape_that_openais_clients_expect(engine: Engine) -> None:
    settings = Sampling(max_tokens=4, ignore_eos=True, logprobs=2)
    reply = engine.chat(TALK, settings)
    plain = engine.generate(engine.chat_prompt(TALK), settings)
    assert set(reply) == {"id", "object", "created", "model", "choices", "usage"}
    assert reply["object"] == "chat.completion"
    assert reply["id"].startswith("chatcmpl-")
    assert isinstance(reply["created"], int)
    (choice,) = reply["choices"]
    assert (choice["index"], choice["finish_reason"]) == (0, "length")
    assert choice["message"] == {"role": "assistant", "content": plain.text}
    assert reply["usage"] == {"prompt_tokens": 19, "completion_tokens": 4, "total_tokens": 23}
    content = choice["logprobs"]["content"]
    assert plain.logprobs is not None
    # The second one took the prompt over from the first, which rounds a little differently.
    assert [item["logprob"] for item in content] == pytest.approx([item.logprob for item in plain.logprobs], abs=1e-5)
    for item in content:
        assert set(item) == {"token", "logprob", "bytes", "top_logprobs"}
        assert [set(other) for other in item["top_logprobs"]] == [{"token", "logprob", "bytes"}] * 2
    json.dumps(reply)


def test_without_logprobs_there_are_none(engine: Engine) -> None:
    assert engine.chat(TALK, Sampling(max_tokens=1))["choices"][0]["logprobs"] is None


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "the conversation is empty"),
        ([{"role": "user"}], "must have a text role and a text content"),
        ([{"content": "Hi"}], "must have a text role and a text content"),
        ([{"role": "user", "content": 5}], "must have a text role and a text content"),
        ([{"role": "user", "content": None}], "must have a text role and a text content"),
    ],
)
def test_a_conversation_that_is_none_is_refused(messages: Any, complaint: str, engine: Engine) -> None:
    with pytest.raises(RequestError, match=complaint):
        engine.chat_prompt(messages)


def test_without_a_template_there_is_no_chat(talker: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(talker, tmp_path / "plain"))
    (folder / "chat_template.jinja").unlink()
    with Engine.load(folder, expert_cache=8, threads=1) as plain:
        assert plain.has_tokenizer
        assert not plain.has_chat_template
        with pytest.raises(RequestError, match="has no chat template: give plain prompts"):
            plain.chat(TALK)
        assert plain.generate("Hi", Sampling(max_tokens=2)).prompt_token_ids == (75, 108)


def test_what_a_template_says_against_a_conversation_is_passed_on(talker: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(talker, tmp_path / "strict"))
    with_tokenizer(folder, "{{ raise_exception('roles must alternate') }}")
    with (
        Engine.load(folder, expert_cache=8, threads=1) as strict,
        pytest.raises(RequestError, match="refuses this conversation: roles must alternate"),
    ):
        strict.chat(TALK)
