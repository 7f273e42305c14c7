"""The replies to one request as they are generated, whatever protocol tells them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

from edgemoe.async_engine import AsyncEngine
from edgemoe.results import Chunk, Completion
from edgemoe.server.deadline import within
from edgemoe.server.protocols.errors import ApiError
from edgemoe.server.protocols.reply import Reply
from edgemoe.server.turns import Turns

MAX_AHEAD = 256
"""While so many chunks of a request wait for its connection, none of its further replies begins."""


class Generation:
    """The chunks of all replies to a request. `running` ends them where its block is left."""

    def __init__(self, reply: Reply) -> None:
        self._reply = reply
        self._chunks: asyncio.Queue[tuple[int, Chunk] | BaseException] = asyncio.Queue()
        self._room = asyncio.Event()
        """Set while further replies may begin."""
        self._room.set()
        self._unfinished = len(reply.asked)
        self._tasks: list[asyncio.Task[None]] = []
        self._failure: ApiError | None = None

    @asynccontextmanager
    async def running(self, engine: AsyncEngine, turns: Turns) -> AsyncIterator[None]:
        """The time in which the replies are generated; what runs at its end is cancelled."""
        self._tasks = [
            asyncio.create_task(self._run(number, engine, turns), name=f"edgemoe-reply-{number}")
            for number in range(len(self._reply.asked))
        ]
        try:
            if self._failure is not None:
                self.fail(self._failure)
            yield
        finally:
            self._cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def next(self, timeout: float | None) -> tuple[int, Chunk] | None:
        """A reply's number and its next chunk; None where none comes in `timeout` seconds, or all are finished.

        Raises what the engine raises, and the error of `fail`.
        """
        if self._failure is not None:
            raise self._failure
        try:
            item = await within(timeout, self._chunks.get())
        except asyncio.TimeoutError:
            return None
        if self._chunks.qsize() < MAX_AHEAD:
            self._room.set()
        if self._failure is not None:
            raise self._failure
        if isinstance(item, BaseException):
            raise item
        self._unfinished -= item[1].finish_reason is not None
        return item

    @property
    def finished(self) -> bool:
        """Whether every reply has its last chunk."""
        return not self._unfinished

    async def completions(self, lossy: str) -> list[Completion]:
        """All replies, once they are finished; `lossy` is that of the engine's plan."""
        chunks: list[list[Chunk]] = [[] for _ in self._reply.asked]
        while not self.finished:
            item = await self.next(None)
            assert item is not None
            chunks[item[0]].append(item[1])
        return [Completion.from_chunks(each, (), lossy) for each in chunks]

    def fail(self, error: ApiError) -> None:
        """Ends the replies: `next` raises `error`, also where it waits."""
        self._failure = error
        self._cancel()
        self._chunks.put_nowait(error)

    def _cancel(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def _run(self, number: int, engine: AsyncEngine, turns: Turns) -> None:
        """Has its turn for one reply, which goes on to its end whatever the connection takes of it: others wait."""
        failure: Exception | None = None
        try:
            begun = False
            while not begun:
                await self._room.wait()
                async with turns.turn(self):
                    # The connection may have been behind by the time of the turn.
                    if begun := self._room.is_set():
                        await self._take(number, engine)
        except Exception as error:
            failure = error
        if failure is not None:
            self._chunks.put_nowait(failure)

    async def _take(self, number: int, engine: AsyncEngine) -> None:
        """Takes the chunks of one reply."""
        prompt, sampling = self._reply.asked[number]
        async with aclosing(engine.stream(prompt, sampling)) as chunks:
            async for chunk in chunks:
                if chunk.finish_reason == "cancelled":
                    raise ApiError(503, "the reply was cut off: the engine is being closed", code="cancelled")
                self._chunks.put_nowait((number, self._reply.limited(chunk)))
                if self._chunks.qsize() >= MAX_AHEAD:
                    self._room.clear()
