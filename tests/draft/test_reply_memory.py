"""The memory of replies, within its bound."""

from __future__ import annotations

import random

from edgemoe.draft.reply_memory import PROMPT_TAIL, Reply, ReplyMemory


def write(memory: ReplyMemory, tokens: list[int], prompt: list[int] | None = None) -> Reply:
    reply = memory.begin(prompt or [])
    for token in tokens:
        memory.append(reply, token)
    return reply


def after(memory: ReplyMemory, tokens: list[int]) -> list[tuple[int, int]]:
    """The followers of the end of `tokens`, each with the length of the suffix that it followed."""
    match = memory.match(memory.begin(()))
    for token in tokens:
        match = memory.advance(match, token)
    return [(follower.token, follower.length) for follower in memory.followers(match)]


def test_replies_are_kept_with_the_end_of_their_prompts() -> None:
    memory = ReplyMemory()
    prompt = list(range(100, 100 + PROMPT_TAIL + 5))
    write(memory, [1, 2], prompt)
    assert len(memory) == PROMPT_TAIL + 2
    assert after(memory, prompt) == [(1, PROMPT_TAIL)]
    assert after(memory, prompt[:5]) == []
    assert after(memory, [1]) == [(2, 1)]


def test_a_replys_match_is_the_whole_reply() -> None:
    memory = ReplyMemory()
    write(memory, [1, 2, 3, 9])
    reply = write(memory, [1, 2, 3])
    assert memory.match(reply).length == 3
    assert [(each.token, each.length) for each in memory.followers(memory.match(reply))] == [(9, 3)]


def test_beyond_the_bound_the_older_half_is_dropped() -> None:
    memory = ReplyMemory(max_tokens=8)
    write(memory, [1, 2, 3])
    write(memory, [4, 5, 6])
    write(memory, [7, 8])
    assert len(memory) == 8
    write(memory, [9])
    assert len(memory) == 5
    assert (after(memory, [1]), after(memory, [4])) == ([], [])
    # A reply that is cut keeps its end.
    assert after(memory, [5]) == [(6, 1)]
    assert after(memory, [7]) == [(8, 1)]


def test_an_unfinished_reply_can_grow_after_half_is_dropped() -> None:
    memory = ReplyMemory(max_tokens=8)
    long = write(memory, [1, 2, 3])
    write(memory, [4, 5, 6, 7, 8])
    for token in (10, 11, 12):
        memory.append(long, token)
    assert after(memory, [2]) == []
    assert after(memory, [10, 11]) == [(12, 2)]
    assert memory.match(long).length == 3


def test_a_reply_longer_than_the_bound_keeps_its_end() -> None:
    memory, draw = ReplyMemory(max_tokens=64), random.Random(1)
    text = [draw.randrange(50) for _ in range(1000)]
    reply = write(memory, text)
    kept = memory.match(reply).length
    assert 32 <= kept == len(memory) <= 64
    assert list(reply.tokens) == text[-kept:]
    assert after(memory, text[-20:-10])[0] == (text[-10], 10)
