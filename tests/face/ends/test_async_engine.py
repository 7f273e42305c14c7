"""The engine in an event loop: many replies at once, tasks that are cancelled, an engine that closes meanwhile."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import TypeVar

import pytest

from edgemoe import AsyncEngine, EdgeMoEError, Engine, Progress, RequestError, Sampling

Result = TypeVar("Result")
SETTINGS = Sampling(max_tokens=8, ignore_eos=True, temperature=0)
LONG = Sampling(max_tokens=400, ignore_eos=True, temperature=0)
PROMPTS = [f"prompt number {number}" for number in range(12)]


@pytest.fixture(scope="module")
def engine(talker: Path) -> Iterator[Engine]:
    with Engine.load(talker, expert_cache=8, threads=1, state_folder="none") as loaded:
        yield loaded


def run(engine: Engine, body: Callable[[AsyncEngine], Awaitable[Result]]) -> Result:
    async def whole() -> Result:
        return await body(AsyncEngine(engine))

    return asyncio.run(whole())


def test_replies_are_those_of_the_engine_and_no_thread_waits_for_each(engine: Engine) -> None:
    expected = [engine.generate(prompt, SETTINGS) for prompt in PROMPTS]
    before = engine.stats.steps

    async def body(waits: AsyncEngine) -> list[tuple[int, ...]]:
        found = await asyncio.gather(*(waits.generate(prompt, SETTINGS) for prompt in PROMPTS))
        assert [each.prompt_token_ids for each in found] == [each.prompt_token_ids for each in expected]
        return [each.token_ids for each in found]

    assert run(engine, body) == [each.token_ids for each in expected]
    assert engine.stats.steps - before < 8 * len(PROMPTS), "they ran as a batch"


def test_chunks_are_those_of_a_stream(engine: Engine) -> None:
    async def body(waits: AsyncEngine) -> list[tuple[str, str | None]]:
        return [(chunk.text, chunk.finish_reason) async for chunk in waits.stream("abc", SETTINGS)]

    assert run(engine, body) == [(chunk.text, chunk.finish_reason) for chunk in engine.stream("abc", SETTINGS)]


def test_a_cancelled_task_ends_its_request(engine: Engine) -> None:
    expected = engine.generate("abc", SETTINGS).token_ids

    async def body(waits: AsyncEngine) -> tuple[int, ...]:
        task = asyncio.create_task(waits.generate("abc", LONG))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return (await waits.generate("abc", SETTINGS)).token_ids

    assert run(engine, body) == expected
    assert engine._between_steps(lambda loop: (loop.scheduler.running, loop.scheduler.waiting)) == (0, 0)


def test_a_stream_that_is_left_ends_its_request(engine: Engine) -> None:
    async def body(waits: AsyncEngine) -> None:
        async with aclosing(waits.stream("abc", LONG)) as chunks:
            async for _ in chunks:
                break

    run(engine, body)
    assert engine._between_steps(lambda loop: (loop.scheduler.running, loop.scheduler.waiting)) == (0, 0)


def test_a_request_that_cannot_be_served_is_refused(engine: Engine) -> None:
    async def body(waits: AsyncEngine) -> None:
        with pytest.raises(RequestError, match="the prompt is empty"):
            await waits.generate("", SETTINGS)

    run(engine, body)


def test_loading_tells_its_progress_in_the_loop_and_the_end_reaches_whoever_waits(talker: Path) -> None:
    threads, seen = set[int](), list[Progress]()

    def show(progress: Progress) -> None:
        threads.add(threading.get_ident())
        seen.append(progress)

    async def body() -> None:
        async with await AsyncEngine.load(talker, threads=1, state_folder="none", on_progress=show) as waits:
            tasks = [asyncio.create_task(waits.generate(prompt, LONG)) for prompt in PROMPTS[:3]]
            await asyncio.sleep(0.1)
            await waits.close()
            for ended in await asyncio.gather(*tasks, return_exceptions=True):
                assert isinstance(ended, EdgeMoEError) or ended.finish_reason == "cancelled"  # type: ignore[union-attr]

    asyncio.run(body())
    assert threads == {threading.get_ident()}
    assert seen
    assert seen[-1].done == seen[-1].total


def test_a_load_whose_task_is_cancelled_gives_everything_back(talker: Path) -> None:
    others = set(threading.enumerate())

    async def body() -> None:
        task = asyncio.create_task(AsyncEngine.load(talker, threads=1, state_folder="none"))
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(body())
    left = [each for each in set(threading.enumerate()) - others if each.name.startswith("edgemoe")]
    for thread in left:
        thread.join(20)
        assert not thread.is_alive()
