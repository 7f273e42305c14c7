"""A reply that is being generated: its chunks as they come, and its end from any thread."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING

from edgemoe.results import Chunk

if TYPE_CHECKING:
    from edgemoe.engine import Engine
    from edgemoe.request.request import Request


class Stream(Iterator[Chunk]):
    """The chunks of one reply. The last one has the `finish_reason`.

    Read by one thread; `cancel`, `close` and the properties are for any thread. Exhaust it or close it: as a context
    manager it closes itself, and so it does when nobody has it any more.
    """

    _over = True

    def __init__(self, engine: Engine, request: Request) -> None:
        self._engine = engine
        self._request = request
        self._over = False

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return self._request.prompt_length

    @property
    def prompt_done(self) -> int:
        """Tokens of the prompt that are computed, or were taken from another request's KV cache.

        While a pass computes some, those are counted in proportion to the layers that it has passed.
        """
        return self._engine._prompt_done(self._request)

    @property
    def finished(self) -> bool:
        """Whether no chunk follows."""
        return self._over

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Chunk:
        """The next chunk. Raises EdgeMoEError after the engine's end, and where the step that computed it failed.

        Where it is interrupted, the request ends.
        """
        if self._over:
            raise StopIteration
        try:
            chunk = self._engine._next_chunk(self._request)
        except BaseException:
            self.close()
            raise
        if self._over:
            # Another thread has closed it.
            raise StopIteration
        self._over = chunk.finish_reason is not None
        return chunk

    def cancel(self) -> None:
        """Ends the request. Returns at once; a last chunk follows, with `finish_reason` "cancelled"."""
        self._engine._cancel([self._request])

    def close(self) -> None:
        """Ends the request and the stream, also for a thread that waits in it. Returns at once. Idempotent."""
        if not self._over:
            self._over = True
            self._engine._cancel([self._request])

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
