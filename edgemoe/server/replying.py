"""Answers a request over HTTP: events or one JSON object, heartbeats, and the end where nobody listens any more."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from edgemoe.async_engine import AsyncEngine
from edgemoe.model_host import ModelHost
from edgemoe.server.deadline import within
from edgemoe.server.generation import Generation
from edgemoe.server.protocols import sse
from edgemoe.server.protocols.errors import ApiError, api_error
from edgemoe.server.protocols.reply import Reply
from edgemoe.server.settings import ServerSettings
from edgemoe.server.turns import Turns

FIRST_WAIT = 1.0
"""Seconds for which an error of the prompt may still become the status of the answer; then the stream begins."""
ABORT = "edgemoe.abort"
"""In the scope of a connection: a function that drops it without waiting for the client to read."""
LOG = logging.getLogger("edgemoe.server")


class Replier:
    """What all requests of a server share: the model, the turns, and who is being answered."""

    def __init__(self, host: ModelHost, turns: Turns, settings: ServerSettings) -> None:
        self.host = host
        self.turns = turns
        self.settings = settings
        self._active: set[Generation] = set()
        self._ending: ApiError | None = None

    @property
    def ending(self) -> bool:
        """Whether the server ends."""
        return self._ending is not None

    def end(self) -> None:
        """Ends all replies, and all later ones at once, with an error that says that the server ends."""
        self._ending = ApiError(503, "the server is being shut down: ask again later", code="shutting_down")
        for generation in self._active:
            generation.fail(self._ending)

    @asynccontextmanager
    async def generating(self, reply: Reply) -> AsyncIterator[Generation]:
        """A request's generation, whose replies begin as soon as the model is loaded."""
        if self._ending is not None:
            raise self._ending
        generation = Generation(reply)
        async with self.turns.request():
            self._active.add(generation)
            begun = asyncio.create_task(self._hold(generation, reply))
            try:
                yield generation
            finally:
                self._active.discard(generation)
                begun.cancel()
                await asyncio.gather(begun, return_exceptions=True)

    async def _hold(self, generation: Generation, reply: Reply) -> None:
        """Holds the model for as long as the generation needs it."""
        failure: Exception | None = None
        try:
            async with leased(self.host) as engine:
                reply.has_tokenizer, reply.lossy = engine.has_tokenizer, engine.plan.lossy
                async with generation.running(AsyncEngine(engine), self.turns):
                    await asyncio.Event().wait()
        except Exception as error:
            failure = error
        if failure is not None:
            generation.fail(api_error(failure))


@asynccontextmanager
async def leased(host: ModelHost) -> AsyncIterator[Any]:
    """The engine of `host`, loaded where it is not; other tasks run while it is."""
    lease = host.lease()
    ready = asyncio.wrap_future(lease.ready)
    # Where nobody waits for it any more, its error is not worth a word.
    ready.add_done_callback(lambda done: done.cancelled() or done.exception())
    try:
        # Others wait for the same loading.
        yield await asyncio.shield(ready)
    finally:
        lease.release()


class ReplyResponse(Response):
    """The answer to a request for replies. It ends at once where the client goes."""

    def __init__(self, replier: Replier, reply: Reply, body: Mapping[str, Any]) -> None:
        super().__init__()
        self._replier = replier
        self._reply = reply
        self._body = body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        abort: Callable[[], None] = scope.get(ABORT, lambda: None)
        answer = asyncio.create_task(self._answer(send))
        gone = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (answer, gone):
                task.cancel()
            ended = await asyncio.gather(answer, gone, return_exceptions=True)
        if isinstance(ended[0], (asyncio.TimeoutError, OSError)):
            # The client does not read: what is written will never be taken.
            abort()
        elif isinstance(ended[0], Exception):
            raise ended[0]

    async def _answer(self, send: Send) -> None:
        begun = False
        failure: Exception | None = None

        async def bounded(message: Message) -> None:
            nonlocal begun
            begun = True
            await within(self._replier.settings.stall_timeout, send(message))

        try:
            async with self._replier.generating(self._reply) as generation:
                await (self._stream if self._reply.stream else self._whole)(generation, bounded)
        except (asyncio.TimeoutError, OSError):
            raise
        except Exception as error:
            failure = error
        if failure is None:
            return
        told = api_error(failure, self._body)
        if told.status == 500:
            LOG.error("a request failed", exc_info=failure)
        if begun:
            await bounded(_part(b"".join(self._reply.failure(told)), last=True))
        else:
            await _json(self._reply.error(told), bounded, told.status, told.headers)

    async def _whole(self, generation: Generation, send: Send) -> None:
        completions = await generation.completions(self._reply.lossy)
        await _json(self._reply.whole(completions), send)

    async def _stream(self, generation: Generation, send: Send) -> None:
        reply, heartbeat = self._reply, self._replier.settings.heartbeat
        item = await generation.next(FIRST_WAIT)
        headers = [(name.encode(), value.encode()) for name, value in sse.HEADERS.items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        events = reply.opening()
        while True:
            events += [reply.heartbeat()] if item is None else reply.chunk(*item)
            if events:
                await send(_part(b"".join(events)))
            if generation.finished:
                break
            events = []
            item = await generation.next(heartbeat)
        await send(_part(b"".join(reply.closing()), last=True))


async def _gone(receive: Receive) -> None:
    """Waits until the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _json(
    body: Mapping[str, Any], send: Send, status: int = 200, headers: Mapping[str, str] | None = None
) -> None:
    made = Response(sse.json_text(body), status, headers, "application/json")
    await send({"type": "http.response.start", "status": status, "headers": made.raw_headers})
    await send(_part(bytes(made.body), last=True))


def _part(body: bytes, *, last: bool = False) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": not last}
