"""The engine for asyncio: the same engine, whose replies are awaited."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing, suppress
from types import TracebackType
from typing import Any

from edgemoe.checkpoint.chat_template import ChatPrompt, Messages
from edgemoe.checkpoint.tokenizer import Prompt
from edgemoe.config import EngineConfig
from edgemoe.engine import Engine
from edgemoe.results import ChatChunks, Chunk, Completion, Progress, chat_completion
from edgemoe.sampling import Sampling
from edgemoe.stream import Stream


class AsyncEngine:
    """Awaits what an `Engine` does. Cancelling a task ends its request at the next layer of the model.

    `engine` may be used beside it, by any thread: requests of both run as one batch. An event loop that waits for
    replies has no thread of its own for each.
    """

    def __init__(self, engine: Engine) -> None:
        """Takes a loaded engine, which `close` closes."""
        self.engine = engine

    @classmethod
    async def load(
        cls,
        model: str | os.PathLike[str] | None = None,
        config: EngineConfig | None = None,
        *,
        on_progress: Callable[[Progress], None] | None = None,
        **settings: Any,
    ) -> AsyncEngine:
        """As `Engine.load`. `on_progress` is called in the event loop. Cancelling the task stops the loading."""
        loop, stop = asyncio.get_running_loop(), threading.Event()

        def tell(progress: Progress) -> None:
            if on_progress is not None:
                loop.call_soon_threadsafe(on_progress, progress)

        def load() -> Engine:
            engine = Engine.load(model, config, on_progress=tell, stop=stop, **settings)
            if stop.is_set():
                # Nobody takes it any more.
                engine.close()
            return engine

        try:
            return cls(await asyncio.to_thread(load))
        except asyncio.CancelledError:
            stop.set()
            raise

    async def stream(self, prompt: Prompt, sampling: Sampling | None = None) -> AsyncGenerator[Chunk, None]:
        """As `Engine.stream`. Raises RequestError at the first chunk. Closing it, or cancelling its task, ends the
        request.
        """
        stream = await asyncio.to_thread(self.engine.stream, prompt, sampling)
        with stream:
            while not stream.finished:
                yield await self._next(stream)

    async def generate(self, prompt: Prompt, sampling: Sampling | None = None) -> Completion:
        """As `Engine.generate`."""
        stream = await asyncio.to_thread(self.engine.stream, prompt, sampling)
        with stream:
            chunks = [await self._next(stream)]
            while not stream.finished:
                chunks.append(await self._next(stream))
        return Completion.from_chunks(chunks, stream.prompt_token_ids, self.engine.plan.lossy)

    async def chat(
        self,
        messages: Messages | ChatPrompt,
        sampling: Sampling | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """As `Engine.chat`."""
        completion = await self.generate(ChatPrompt.of(messages, template_kwargs), sampling)
        return chat_completion(completion, self.engine.model_name)

    async def chat_stream(
        self,
        messages: Messages | ChatPrompt,
        sampling: Sampling | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> AsyncGenerator[dict[str, Any], None]:
        """As `Engine.chat_stream`."""
        made = ChatChunks(self.engine.model_name)
        async with aclosing(self.stream(ChatPrompt.of(messages, template_kwargs), sampling)) as chunks:
            async for chunk in chunks:
                yield made.of(chunk)

    async def close(self) -> None:
        """As `Engine.close`, without holding the event loop up."""
        await asyncio.to_thread(self.engine.close)

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _next(self, stream: Stream) -> Chunk:
        """The next chunk of a stream that is not over, without a thread that waits for it."""
        loop = asyncio.get_running_loop()
        ready = loop.create_future()

        def tell() -> None:
            if not ready.done():
                ready.set_result(None)

        def tell_loop() -> None:
            # In the engine's thread, maybe after the event loop's end.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(tell)

        stream.when_ready(tell_loop)
        await ready
        # Ready: it does not wait.
        return next(stream)
