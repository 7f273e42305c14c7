"""Many requests in one call: read a little ahead, given back as they finish, each with what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from edgemoe import CheckpointError, Completion, EdgeMoEError, Engine, RequestError, Sampling
from edgemoe.engine import MAX_READ_AHEAD, READ_AHEAD_BATCHES

LIMIT = 2


@pytest.fixture
def engine(talker: Path) -> Iterator[Engine]:
    with Engine.load(talker, expert_cache=8, threads=1, batch=LIMIT) as loaded:
        yield loaded


def wants(tokens: int) -> Sampling:
    return Sampling(max_tokens=tokens, ignore_eos=True, temperature=0)


class Source:
    """An input that counts what has been read of it, and never ends."""

    def __init__(self, tokens: int = 3) -> None:
        self.read = 0
        self._settings = wants(tokens)

    def __iter__(self) -> Iterator[tuple[str, Sampling]]:
        while True:
            self.read += 1
            yield f"request {self.read}", self._settings


def test_every_request_is_answered_once_as_if_it_were_alone(engine: Engine) -> None:
    requests = [
        (f"prompt {number}", Sampling(max_tokens=3 + number % 4, temperature=1.0, seed=number, ignore_eos=True))
        for number in range(11)
    ]
    replies = dict(engine.generate_batch(requests))
    assert sorted(replies) == list(range(11))
    for number, request in enumerate(requests):
        reply = replies[number]
        expected = engine.generate(*request)
        assert isinstance(reply, Completion)
        assert (reply.token_ids, reply.text) == (expected.token_ids, expected.text)
        assert reply.finish_reason == "length"
        assert reply.prompt_token_ids == expected.prompt_token_ids
    assert engine._loop.scheduler.running == engine._loop.scheduler.waiting == 0


def test_replies_come_as_they_finish(engine: Engine) -> None:
    """Two at a time: the first is long, so that all others are done before it."""
    counts = [20, 5, 1, 9]
    requests = [([10 + number], wants(count)) for number, count in enumerate(counts)]
    assert [number for number, _ in engine.generate_batch(requests)] == [1, 2, 3, 0]


def test_input_is_read_a_few_batches_ahead_and_no_further(engine: Engine) -> None:
    source = Source()
    replies = engine.generate_batch(source)
    assert source.read == 0, "nothing is read before the first reply is asked for"
    for given in range(1, 30):
        next(replies)
        assert given + LIMIT <= source.read <= given + READ_AHEAD_BATCHES * LIMIT
    replies.close()


@pytest.mark.parametrize(("batch", "ahead"), [(1, READ_AHEAD_BATCHES), (100, MAX_READ_AHEAD), (600, 1200)])
def test_a_large_batch_is_not_read_that_many_times_ahead(batch: int, ahead: int, talker: Path) -> None:
    """What waits takes memory; but the next batch is always there when this one ends."""
    assert MAX_READ_AHEAD < 100 * READ_AHEAD_BATCHES
    with Engine.load(talker, expert_cache=8, threads=1, batch=batch) as engine:
        assert engine._max_in_flight() == ahead


def test_an_input_of_nothing_has_no_replies(engine: Engine) -> None:
    assert list(engine.generate_batch([])) == []
    assert engine.stats.steps == 0


def test_what_is_wrong_with_a_request_is_told_in_its_place_and_the_others_go_on(engine: Engine) -> None:
    requests: list[tuple[Any, Sampling]] = [
        ("good", wants(2)),
        ("", wants(2)),
        ([5, 10**6], wants(2)),
        ([5] * 600, wants(2)),
        ("good too", wants(2)),
        ([{"role": "user"}], wants(2)),
    ]
    replies = dict(engine.generate_batch(requests))
    assert sorted(replies) == list(range(6))
    complaints = {1: "the prompt is empty", 2: "outside the vocabulary", 3: "600 tokens", 5: "must have a text role"}
    for number, reply in replies.items():
        if number in complaints:
            assert isinstance(reply, RequestError)
            assert complaints[number] in str(reply)
        else:
            assert isinstance(reply, Completion)
    assert engine.stats.requests == 2


def test_requests_that_are_all_wrong_are_read_one_by_one(engine: Engine) -> None:
    """They hold no place, so that an endless stream of them is neither read ahead nor gathered."""
    read = 0

    def wrong() -> Iterator[tuple[str, Sampling]]:
        nonlocal read
        while True:
            read += 1
            yield "", wants(1)

    replies = engine.generate_batch(wrong())
    for number in range(50):
        assert next(replies)[0] == number
        assert read == number + 1
    replies.close()


def test_a_conversation_is_a_prompt(engine: Engine) -> None:
    talk = [{"role": "user", "content": "Hi"}]
    ((number, reply),) = engine.generate_batch([(talk, wants(4))])
    assert isinstance(reply, Completion)
    assert number == 0
    assert list(reply.prompt_token_ids) == engine.chat_prompt(talk)
    assert reply.token_ids == engine.generate(engine.chat_prompt(talk), wants(4)).token_ids


def test_requests_that_begin_alike_run_together_though_they_came_apart(engine: Engine) -> None:
    headers = ["A" * 100, "B" * 100, "C" * 100]
    requests = [(f"{headers[number % 3]}{number}", wants(1)) for number in range(8)]
    order = [number % 3 for number, _ in engine.generate_batch(requests)]
    assert [set(order[pair : pair + LIMIT]) for pair in range(0, 8, LIMIT)] == [{0}, {0, 1}, {1}, {2}]


def test_closing_it_ends_what_is_in_flight(engine: Engine) -> None:
    replies = engine.generate_batch([([10], wants(1)), *(([11 + number], wants(300)) for number in range(6))])
    assert next(replies)[0] == 0
    replies.close()
    steps = engine.stats.steps
    assert engine.generate("abc", wants(3)).finish_reason == "length"
    assert engine.stats.steps == steps + 3
    assert engine._loop.scheduler.running == engine._loop.scheduler.waiting == 0


def test_cancelling_ends_what_is_in_flight_and_not_what_is_read_later(engine: Engine) -> None:
    requests = [([10 + number], wants(4)) for number in range(READ_AHEAD_BATCHES * LIMIT + 3)]
    reasons: dict[int, str] = {}
    for number, reply in engine.generate_batch(requests):
        assert isinstance(reply, Completion)
        if not reasons:
            engine.cancel()
        reasons[number] = reply.finish_reason
    flying = READ_AHEAD_BATCHES * LIMIT
    assert reasons[0] == "length"
    # The second had finished in the same step as the first.
    assert {reasons[number] for number in range(2, flying)} == {"cancelled"}
    assert [reasons[number] for number in range(flying, flying + 3)] == ["length"] * 3


def test_cancelling_what_has_not_begun_lets_the_running_ones_finish(engine: Engine) -> None:
    requests = [([10 + number], wants(1 if number == 0 else 6)) for number in range(READ_AHEAD_BATCHES * LIMIT)]
    reasons: dict[int, str] = {}
    for number, reply in engine.generate_batch(requests):
        assert isinstance(reply, Completion)
        if number == 0:
            engine.cancel(running=False)
        reasons[number] = reply.finish_reason
    assert [number for number, reason in sorted(reasons.items()) if reason == "length"] == [0, 1]
    assert len(reasons) == len(requests)


def test_a_step_that_fails_is_raised_and_ends_the_rest(engine: Engine) -> None:
    runner = engine._loop.runner.model
    run = runner.run_sampled

    def fail(inputs: Sequence[Any]) -> Any:
        raise OSError("the link is down")

    replies = engine.generate_batch([([10], wants(1)), *(([11 + number], wants(9)) for number in range(5))])
    assert next(replies)[0] == 0
    runner.run_sampled = fail  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match="the link is down"):
        next(replies)
    runner.run_sampled = run  # type: ignore[method-assign]
    assert list(replies) == []
    assert len(list(engine.generate_batch([("abc", wants(2))] * 3))) == 3
    assert engine._loop.scheduler.running == engine._loop.scheduler.waiting == 0


def test_an_error_of_the_input_goes_on_and_ends_what_is_in_flight(engine: Engine) -> None:
    def torn() -> Iterator[tuple[str, Sampling]]:
        yield "first", wants(50)
        raise ValueError("the input is torn")

    with pytest.raises(ValueError, match="the input is torn"):
        next(engine.generate_batch(torn()))
    steps = engine.stats.steps
    engine.generate("abc", wants(2))
    assert engine.stats.steps == steps + 2


def test_a_stream_beside_it_gets_its_own_reply(engine: Engine) -> None:
    expected = engine.generate("beside", wants(6)).token_ids
    replies = engine.generate_batch([(f"line {number}", wants(4)) for number in range(6)])
    first, _ = next(replies)
    stream = engine.stream("beside", wants(6))
    taken = next(stream).token_ids
    others = [number for number, _ in replies]
    assert sorted([first, *others]) == list(range(6))
    assert (*taken, *(token for chunk in stream for token in chunk.token_ids)) == expected


@pytest.mark.parametrize("count", [3, 100])
def test_after_closing_the_engine_it_ends_with_the_reason(count: int, engine: Engine) -> None:
    """Whether its input has been read to the end or not."""
    replies = engine.generate_batch([(f"line {number}", wants(1 + number)) for number in range(count)])
    next(replies)
    engine.close()
    with pytest.raises(EdgeMoEError, match="the engine is closed: load it again"):
        for _ in replies:
            pass
