"""The tokens that a reply says it took, and how many replies one request may ask for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from edgemoe import Chunk, Completion
from edgemoe.server.protocols.fields import FieldError
from edgemoe.server.protocols.openai_chat import ChatReply
from edgemoe.server.protocols.openai_completions import MAX_REPLIES, CompletionReply
from edgemoe.server.protocols.reply import ServedModel
from tests.support.fake_engine import timings

SERVED = ServedModel("the-model", 1_700_000_000)
USER = [{"role": "user", "content": "Hi"}]


def end(prompt: int, shared: int) -> Chunk:
    return Chunk("a", (1,), "length", None, replace(timings(prompt, 1), shared_tokens=shared))


def usages(
    kind: type[ChatReply] | type[CompletionReply], body: dict[str, Any], ends: list[Chunk]
) -> list[dict[str, Any]]:
    """The usage of the replies `ends`, streamed and whole."""
    streamed = kind({**body, "stream": True, "stream_options": {"include_usage": True}}, SERVED)
    for index, each in reversed(list(enumerate(ends))):
        streamed.chunk(index, each)
    whole = kind(body, SERVED).whole([Completion.from_chunks([each], ()) for each in ends])
    return [streamed.usage(), whole["usage"]]


@pytest.mark.parametrize("prompts", [["a", "a"], ["ab", "ab"], [[5], [5]]])
def test_each_prompt_counts_whatever_it_is(prompts: list[Any]) -> None:
    # Python has one object for equal texts of one character.
    for usage in usages(CompletionReply, {"prompt": prompts, "n": 2}, [end(3, 0)] * 4):
        assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (6, 4, 10)


@pytest.mark.parametrize("shared", [[0, 6, 6], [6, 0, 6]])
def test_what_choices_have_from_one_another_was_not_cached_before(shared: list[int]) -> None:
    for usage in usages(ChatReply, {"messages": USER, "n": 3}, [end(7, each) for each in shared]):
        assert usage["prompt_tokens"] == 7
        assert usage["prompt_tokens_details"] == {"cached_tokens": 0}


def test_a_request_asks_for_so_many_replies_at_most() -> None:
    assert len(CompletionReply({"prompt": ["a"] * (MAX_REPLIES // 2), "n": 2}, SERVED).asked) == MAX_REPLIES
    with pytest.raises(FieldError, match="n is 128 for each of 17 prompts; give at most 2048 replies in all"):
        CompletionReply({"prompt": ["a"] * 17, "n": 128}, SERVED)
