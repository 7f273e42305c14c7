"""Streams of one thread and of many run together: each gets its own reply, its own errors and its own end."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from edgemoe import CheckpointError, EdgeMoEError, Engine, Sampling

PROMPTS = ["abc", "xyz and more", "123", "a much longer prompt than the others have", "~"]
SETTINGS = Sampling(max_tokens=12, ignore_eos=True, temperature=0)
LONG = Sampling(max_tokens=200, ignore_eos=True, temperature=0)


@pytest.fixture
def engine(talker: Path) -> Iterator[Engine]:
    with Engine.load(talker, expert_cache=8, threads=1, batch=4) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def expected(talker: Path) -> dict[str, tuple[int, ...]]:
    """The replies to PROMPTS one at a time."""
    with Engine.load(talker, expert_cache=8, threads=1, batch=1) as single:
        return {prompt: single.generate(prompt, SETTINGS).token_ids for prompt in PROMPTS}


def in_threads(tasks: Sequence[Callable[[], Any]]) -> list[Any]:
    """What each task returns or raises, in a thread of its own."""
    outcomes: list[Any] = [None] * len(tasks)

    def run(number: int) -> None:
        try:
            outcomes[number] = tasks[number]()
        except BaseException as error:
            outcomes[number] = error

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(len(tasks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    return outcomes


@contextmanager
def failing(engine: Engine, error: BaseException) -> Iterator[list[int]]:
    """In the block every pass of `engine` raises `error`; yields how many sequences each had."""
    runner = engine._loop.runner.model
    run, failed = runner.run_sampled, list[int]()

    def fail(inputs: Sequence[Any]) -> Any:
        failed.append(len(inputs))
        raise error

    runner.run_sampled = fail  # type: ignore[method-assign]
    try:
        yield failed
    finally:
        runner.run_sampled = run  # type: ignore[method-assign]


def test_streams_of_one_thread_run_together(engine: Engine, expected: dict[str, tuple[int, ...]]) -> None:
    """Read in turns; every step is for all of them, so that there are hardly more steps than one reply has tokens."""
    streams = [engine.stream(prompt, SETTINGS) for prompt in PROMPTS[:4]]
    replies: list[list[int]] = [[] for _ in streams]
    for _ in range(12):
        for stream, reply in zip(streams, replies, strict=True):
            reply += next(stream).token_ids
    assert [tuple(reply) for reply in replies] == [expected[prompt] for prompt in PROMPTS[:4]]
    assert engine.stats.steps <= 12 + len(streams)
    assert engine.stats.requests == 4


def test_what_other_streams_steps_have_brought_is_given_without_a_step(engine: Engine) -> None:
    streams = [engine.stream(prompt, SETTINGS) for prompt in PROMPTS[:4]]
    for stream in streams:
        next(stream)
    assert engine.stats.steps == 1
    for _ in range(3):
        next(streams[0])
    assert engine.stats.steps == 4
    for stream in streams:
        next(stream)
    assert engine.stats.steps == 5, "the first stream alone needed one"


def test_a_generate_within_a_stream_of_the_same_thread_neither_waits_nor_disturbs(
    engine: Engine, expected: dict[str, tuple[int, ...]]
) -> None:
    stream = engine.stream("abc", SETTINGS)
    first = next(stream).token_ids
    assert engine.generate("xyz and more", SETTINGS).token_ids == expected["xyz and more"]
    assert (*first, *(token for chunk in stream for token in chunk.token_ids)) == expected["abc"]


def test_more_streams_than_places_wait_their_turn(engine: Engine, expected: dict[str, tuple[int, ...]]) -> None:
    streams = {prompt: engine.stream(prompt, SETTINGS) for prompt in PROMPTS}
    first = {prompt: next(stream).token_ids for prompt, stream in streams.items()}
    rest = {prompt: [token for chunk in stream for token in chunk.token_ids] for prompt, stream in streams.items()}
    assert {prompt: (*first[prompt], *rest[prompt]) for prompt in PROMPTS} == expected


def test_threads_at_once_get_their_own_replies(engine: Engine, expected: dict[str, tuple[int, ...]]) -> None:
    def ask(prompt: str) -> tuple[int, ...]:
        return engine.generate(prompt, SETTINGS).token_ids

    prompts = PROMPTS * 3
    outcomes = in_threads([lambda prompt=prompt: ask(prompt) for prompt in prompts])  # type: ignore[misc]
    assert outcomes == [expected[prompt] for prompt in prompts]
    assert engine.stats.steps < 12 * len(prompts), "threads that wait are served by one another's steps"


def test_a_stream_begins_when_it_is_first_asked(engine: Engine) -> None:
    never = engine.stream("abc", LONG)
    assert engine.stats.requests == 0
    never.close()
    assert engine.stats.requests == 0


def test_streams_that_are_closed_or_forgotten_free_their_places(
    engine: Engine, expected: dict[str, tuple[int, ...]]
) -> None:
    streams = [engine.stream(prompt, LONG) for prompt in PROMPTS[:4]]
    for stream in streams:
        next(stream)
    streams[0].close()
    del stream
    streams.clear()
    assert engine.generate("~", SETTINGS).token_ids == expected["~"]
    assert engine._loop.scheduler.running == engine._loop.scheduler.waiting == 0
    assert engine.stats.steps < 4 + 4 + 12 + 2, "nothing was computed for those that nobody reads"


def test_cancelling_ends_every_stream(engine: Engine) -> None:
    streams = [engine.stream(prompt, LONG) for prompt in PROMPTS[:2]]
    for stream in streams:
        next(stream)
    engine.cancel()
    for stream in streams:
        assert list(stream)[-1].finish_reason == "cancelled"
    assert engine.generate("abc", SETTINGS).finish_reason == "length"


def test_cancelling_what_has_not_begun_lets_the_running_ones_finish(
    engine: Engine, expected: dict[str, tuple[int, ...]]
) -> None:
    running = {prompt: engine.stream(prompt, SETTINGS) for prompt in PROMPTS[:4]}
    begun = {prompt: next(stream).token_ids for prompt, stream in running.items()}
    waiting = engine.stream("~", SETTINGS)
    engine.cancel(running=False)
    rest = {prompt: [token for chunk in stream for token in chunk.token_ids] for prompt, stream in running.items()}
    for prompt in running:
        assert (*begun[prompt], *rest[prompt]) == expected[prompt]
    assert [chunk.finish_reason for chunk in waiting] == ["cancelled"]
    assert engine.generate("~", SETTINGS).token_ids == expected["~"]


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (OSError("the link is down"), CheckpointError, r"cannot be read any more \(the link is down\): fetch it again"),
        (RuntimeError("no such kernel"), EdgeMoEError, r"failed \(RuntimeError\('no such kernel'\)\): ask again"),
    ],
)
def test_a_step_that_fails_is_told_to_everyone_who_was_part_of_it(
    error: Exception, kind: type[Exception], message: str, engine: Engine, expected: dict[str, tuple[int, ...]]
) -> None:
    """Whichever stream computed it; the engine goes on."""
    streams = [engine.stream(prompt, LONG) for prompt in PROMPTS[:3]]
    for stream in streams:
        next(stream)
    with failing(engine, error) as failed:
        for stream in streams:
            with pytest.raises(kind, match=message) as told:
                list(stream)
            assert told.value.__cause__ is error
    assert failed == [3], "one step failed, for all"
    assert engine.generate("abc", SETTINGS).token_ids == expected["abc"]


def test_threads_are_told_of_a_failed_step_and_can_ask_again(
    engine: Engine, expected: dict[str, tuple[int, ...]]
) -> None:
    meeting = threading.Barrier(4)

    def ask(prompt: str) -> tuple[int, ...]:
        stream = engine.stream(prompt, LONG)
        next(stream)
        meeting.wait(20)
        meeting.wait(20)
        with pytest.raises(CheckpointError, match="the link is down"):
            list(stream)
        meeting.wait(20)
        meeting.wait(20)
        return engine.generate(prompt, SETTINGS).token_ids

    def break_the_link() -> None:
        meeting.wait(20)
        with failing(engine, OSError("the link is down")):
            meeting.wait(20)
            meeting.wait(20)
        meeting.wait(20)

    outcomes = in_threads([break_the_link, *(lambda prompt=prompt: ask(prompt) for prompt in PROMPTS[:3])])
    assert outcomes[1:] == [expected[prompt] for prompt in PROMPTS[:3]]


def test_who_was_no_part_of_a_failed_step_is_not_disturbed_by_computing_it(
    engine: Engine, expected: dict[str, tuple[int, ...]]
) -> None:
    """It waits for a place, and so it computes the step of the four that have one."""
    streams = [engine.stream(prompt, LONG) for prompt in PROMPTS[:4]]
    for stream in streams:
        next(stream)
    last = engine.stream("~", SETTINGS)
    runner = engine._loop.runner.model
    run = runner.run_sampled

    def fail_once(inputs: Sequence[Any]) -> Any:
        runner.run_sampled = run  # type: ignore[method-assign]
        raise OSError("the link is down")

    runner.run_sampled = fail_once  # type: ignore[method-assign]
    assert tuple(token for chunk in last for token in chunk.token_ids) == expected["~"]
    for stream in streams:
        with pytest.raises(CheckpointError, match="the link is down"):
            list(stream)


def test_closing_ends_every_open_stream_with_the_reason(engine: Engine) -> None:
    streams = [engine.stream(prompt, LONG) for prompt in PROMPTS[:4]]
    for stream in streams:
        next(stream)
    engine.close()
    for stream in streams:
        with pytest.raises(EdgeMoEError, match="the engine is closed: load it again"):
            next(stream)
        assert list(stream) == []


def test_closing_while_threads_generate_ends_them_all(engine: Engine) -> None:
    going = threading.Barrier(4)

    def ask(prompt: str) -> str:
        stream = engine.stream(prompt, Sampling(max_tokens=400, ignore_eos=True))
        next(stream)
        going.wait(20)
        return str(list(stream)[-1].finish_reason)

    def close() -> None:
        going.wait(20)
        engine.close()

    outcomes = in_threads([close, *(lambda prompt=prompt: ask(prompt) for prompt in PROMPTS[:3])])
    for outcome in outcomes[1:]:
        assert outcome == "cancelled" or (isinstance(outcome, EdgeMoEError) and "is closed" in str(outcome))


def test_closing_gives_the_pasts_of_open_streams_back_at_once(engine: Engine) -> None:
    gc.collect()
    gc.disable()
    try:
        stream = engine.stream("abc", LONG)
        next(stream)
        cache = weakref.ref(engine._loop.scheduler._running[0].cache)
        assert cache() is not None
        engine.close()
        assert cache() is None
        stream.close()
    finally:
        gc.enable()
