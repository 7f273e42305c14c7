"""Replies are generated to their ends whatever their connections take, so that nobody waits for a slow reader."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from edgemoe.results import Chunk
from edgemoe.server.generation import MAX_AHEAD, Generation
from edgemoe.server.turns import Turns
from tests.support.fake_engine import timings

CHUNKS = 2 * MAX_AHEAD


class Talker:
    """An engine whose replies have `CHUNKS` chunks."""

    def __init__(self) -> None:
        self.begun: list[Any] = []

    async def stream(self, prompt: Any, sampling: Any) -> AsyncGenerator[Chunk, None]:
        self.begun.append(prompt)
        for number in range(CHUNKS):
            await asyncio.sleep(0)
            yield Chunk("a", (97,), "length" if number == CHUNKS - 1 else None, None, timings(1, number))


def asked(*prompts: str) -> Any:
    return SimpleNamespace(asked=[(prompt, None) for prompt in prompts], limited=lambda chunk: replace(chunk, text="b"))


async def read(generation: Generation) -> int:
    """Chunks of all replies."""
    count = 0
    while not generation.finished:
        item = await generation.next(None)
        assert item is not None
        # What the reply's protocol tells of it.
        assert item[1].text == "b"
        count += 1
    return count


def test_who_reads_nothing_keeps_nobody_waiting() -> None:
    async def run() -> None:
        engine: Any = Talker()
        turns = Turns(1, 10)
        deaf, other = Generation(asked("deaf 1", "deaf 2", "deaf 3")), Generation(asked("other"))
        async with deaf.running(engine, turns), other.running(engine, turns):
            assert await asyncio.wait_for(read(other), 60) == CHUNKS
            for _ in range(10 * CHUNKS):
                await asyncio.sleep(0)
            # Nothing more is generated for who takes nothing ...
            assert engine.begun == ["deaf 1", "other"]
            assert turns.running == 0
            # ... until it does.
            assert await asyncio.wait_for(read(deaf), 60) == 3 * CHUNKS
        assert sorted(engine.begun) == ["deaf 1", "deaf 2", "deaf 3", "other"]
        assert (turns.running, turns.waiting) == (0, 0)

    asyncio.run(run())


def test_the_end_of_a_request_ends_replies_that_wait_for_room() -> None:
    async def run() -> None:
        engine: Any = Talker()
        turns = Turns(1, 10)
        generation = Generation(asked("one", "two"))
        async with generation.running(engine, turns):
            for _ in range(10 * CHUNKS):
                await asyncio.sleep(0)
        assert engine.begun == ["one"]
        assert (turns.running, turns.waiting) == (0, 0)

    asyncio.run(run())
