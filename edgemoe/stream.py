"""A reply that is being generated: its chunks as they come, and its end from any thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import TracebackType

from edgemoe.errors import EdgeMoEError, RequestError, is_out_of_memory, reason, unreadable
from edgemoe.request.request import Request
from edgemoe.results import Chunk, Completion
from edgemoe.worker.worker import Worker


class Stream(Iterator[Chunk]):
    """The chunks of one reply. The last one has the `finish_reason`.

    Read by one thread; `cancel`, `close` and the properties are for any thread. Exhaust it or close it: as a context
    manager it closes itself, and so it does when nobody has it any more.
    """

    def __init__(self, worker: Worker, request: Request, model: str, engine: object) -> None:
        """`request` is the worker's. `model` is its name, for messages; `engine` lives as long as the stream."""
        self._worker = worker
        self._request = request
        self._model = model
        self._engine = engine
        self._prompt_done = 0
        self._over = False
        worker.watch(self, request)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return self._request.prompt_length

    @property
    def prompt_token_ids(self) -> tuple[int, ...]:
        """The prompt."""
        return tuple(self._request.tokens[: self._request.prompt_length])

    @property
    def prompt_done(self) -> int:
        """Tokens of the prompt that are computed, or were taken from another request's KV cache.

        While a pass computes some, those are counted in proportion to the layers that it has passed.
        """
        self._prompt_done = max(self._prompt_done, self._worker.prompt_done(self._request))
        return self._prompt_done

    @property
    def finished(self) -> bool:
        """Whether no chunk follows."""
        return self._over

    @property
    def ended(self) -> bool:
        """Whether the request has ended; chunks of it may be left."""
        return self._request.finished

    @property
    def ready(self) -> bool:
        """Whether there is a chunk, or an end, that does not have to be waited for."""
        return bool(self._request.chunks) or self._request.finished

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Chunk:
        """The next chunk. Raises EdgeMoEError after the engine's end, and where the step that computed it failed.

        Where it is interrupted, the request ends.
        """
        if self._over:
            raise StopIteration
        try:
            chunk = self._next_chunk()
            if self._over:
                # Another thread has closed it.
                raise StopIteration
            self._over = chunk.finish_reason is not None
            return chunk
        except BaseException:
            self.close()
            raise

    def completion(self, lossy: str = "") -> Completion:
        """The whole reply, once it has ended. No chunk may have been taken. Raises as `__next__` does.

        `lossy` names the settings that make it differ from the model's own.
        """
        try:
            self._worker.wait(lambda: self._request.finished)
            if self._request.error is not None:
                raise self._failure()
            return Completion.from_chunks(list(self._request.chunks), self.prompt_token_ids, lossy)
        finally:
            self.close()

    def when_ready(self, tell: Callable[[], None]) -> None:
        """Has `tell` called once `next` would return or raise without waiting; has steps run meanwhile.

        It is called in the engine's thread, or at once in the caller's; it must not wait or raise.
        """
        if self.ready:
            tell()
        else:
            self._worker.tell_when(lambda: self.ready, tell)

    def cancel(self) -> None:
        """Ends the request. Returns at once; a last chunk follows, with `finish_reason` "cancelled"."""
        request = self._request
        if not request.finished:
            self._worker.post(lambda loop: loop.cancel(lambda each: each is request))

    def close(self) -> None:
        """Ends the request and the stream, also for a thread that waits in it. Returns at once. Idempotent."""
        if not self._over:
            self._over = True
            self.cancel()

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _next_chunk(self) -> Chunk:
        self._worker.check()
        if not self._request.chunks:
            self._worker.wait(lambda: self.ready)
        if self._request.chunks:
            return self._request.chunks.popleft()
        raise self._failure()

    def _failure(self) -> EdgeMoEError:
        """The error of a request whose step failed."""
        error = self._request.error
        if isinstance(error, RequestError):
            return error
        if isinstance(error, OSError):
            told: EdgeMoEError = unreadable(self._model, error)
        elif error is not None and is_out_of_memory(error):
            told = EdgeMoEError(
                f"there was no memory for a step ({reason(error)}): "
                "give a smaller expert_cache=, batch=, prefill_chunk= or context="
            )
        else:
            told = EdgeMoEError(f"a step that this request was part of failed ({error!r}): ask again")
        told.__cause__ = error
        return told
