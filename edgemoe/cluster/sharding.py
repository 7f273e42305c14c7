"""Divides one batch of requests among several engines, and sends the requests of a lost engine to the others."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from edgemoe.cluster.actor import NOT_BEGUN, NumberedReply, NumberedRequest
from edgemoe.cluster.remote_engine import EngineLost, RemoteEngine
from edgemoe.errors import EdgeMoEError
from edgemoe.sampling import Sampling

if TYPE_CHECKING:
    from edgemoe.checkpoint.tokenizer import Prompt

MIN_SHARD = 16
"""Minimum number of requests of a shard, as long as there are enough."""
SHARD_BATCHES = 2
"""Size of a shard in batches of the engine. An engine has up to two shards: as much as it reads ahead on its own."""
PATIENCE_SECONDS = 0.25
"""How long an exchange waits for a reply; a cancel may take as long to reach the engine."""


class Sharding:
    """One batch, from its requests to its replies. Each request gets exactly one reply.

    Requests that a lost engine has not answered go to the other engines, before any new ones. Only `cancel` and
    `leave` may be called from other threads.
    """

    def __init__(
        self, number: int, engines: Sequence[RemoteEngine], requests: Iterable[tuple[Prompt, Sampling]]
    ) -> None:
        self._number = number
        self._engines = engines
        self._source = enumerate(requests)
        self._exhausted = False
        self._requeued: deque[NumberedRequest] = deque()
        """Unanswered requests of lost engines."""
        self._unanswered: dict[RemoteEngine, dict[int, NumberedRequest]] = {engine: {} for engine in engines}
        self._calls: dict[Any, RemoteEngine] = {}
        """Running exchanges: at most one per engine, so that their order is known."""
        self._requested_cancels: deque[bool] = deque()
        """Cancels by `cancel` since the last step, each with its `running`."""
        self._cancels: dict[RemoteEngine, bool] = {}
        """Cancels for the next exchange with each engine; True also cancels running requests."""
        self._stepping = threading.Lock()
        self._left = False

    def replies(self) -> Generator[NumberedReply, None, None]:
        """Yields replies as they arrive. Raises the errors of engines, and EdgeMoEError if no engine is left."""
        try:
            while not self._done:
                with self._stepping:
                    if self._left:
                        raise EdgeMoEError("the engines are closed: load them again with RayEngines.load")
                    replies = self._step()
                yield from replies
        finally:
            with self._stepping:
                self._end()

    def cancel(self, *, running: bool) -> None:
        """Cancels the requests read so far; without `running`, only those that no engine has begun. Thread-safe."""
        self._requested_cancels.append(running)

    def leave(self) -> None:
        """Waits for the current step; the next one raises. Call it before disconnecting. Thread-safe."""
        with self._stepping:
            self._left = True

    @property
    def _done(self) -> bool:
        return self._exhausted and not self._requeued and not any(self._unanswered.values())

    def _step(self) -> list[NumberedReply]:
        """Sends requests to the engines without a running exchange, and waits a moment for replies of any engine."""
        replies = self._apply_cancels()
        shards = self._assign()
        try:
            ready = self._exchange(shards, 0.0 if replies else PATIENCE_SECONDS)
        except ConnectionError as error:
            raise EdgeMoEError(
                f"the connection to the Ray cluster broke ({error}): "
                "what has finished stays; ask for the rest again (edgemoe run --resume)"
            ) from error
        for call in ready:
            replies += self._receive(self._calls.pop(call), call)
        return replies

    def _apply_cancels(self) -> list[NumberedReply]:
        """Notes requested cancels for every engine. Returns cancelled replies for the requests that no engine has."""
        replies: list[NumberedReply] = []
        while self._requested_cancels:
            running = self._requested_cancels.popleft()
            for engine in self._engines:
                if self._unanswered[engine]:
                    self._cancels[engine] = running or self._cancels.get(engine, False)
            replies += [(request.number, NOT_BEGUN) for request in self._requeued]
            self._requeued.clear()
        return replies

    def _exchange(self, shards: dict[RemoteEngine, list[NumberedRequest]], patience: float) -> list[Any]:
        """Starts exchanges with the free engines that have requests; waits up to `patience` seconds for one to end."""
        import ray

        if not ray.is_initialized():
            raise ConnectionError("it has been closed")
        for engine, shard in shards.items():
            if self._unanswered[engine]:
                cancel = self._cancels.pop(engine, None)
                self._calls[engine.exchange(self._number, shard, cancel, PATIENCE_SECONDS)] = engine
        if not self._calls:
            return []
        ready: list[Any] = ray.wait(list(self._calls), timeout=patience)[0]
        return ready

    def _free(self) -> list[RemoteEngine]:
        """The engines without a running exchange. Requeues what lost ones had; raises EdgeMoEError if all are lost."""
        for engine in self._engines:
            if engine.lost is not None:
                self._requeue(engine)
        reasons = [f"node {engine.node}: {engine.lost}" for engine in self._engines if engine.lost is not None]
        if len(reasons) == len(self._engines):
            raise EdgeMoEError(
                f"all engines of the Ray cluster are gone ({'; '.join(reasons)}): what has finished stays; see in "
                "'ray status' what is left, and ask for the rest again (edgemoe run --resume)"
            )
        busy = set(self._calls.values())
        return [engine for engine in self._engines if engine.lost is None and engine not in busy]

    def _assign(self) -> dict[RemoteEngine, list[NumberedRequest]]:
        """Assigns each request to the free engine with the fewest unanswered ones, up to two shards each."""
        free = self._free()
        shards: dict[RemoteEngine, list[NumberedRequest]] = {engine: [] for engine in free}
        with_room = [engine for engine in free if len(self._unanswered[engine]) <= _shard_size(engine)]
        while with_room:
            request = self._next_request()
            if request is None:
                break
            engine = min(with_room, key=lambda engine: len(self._unanswered[engine]))
            shards[engine].append(request)
            self._unanswered[engine][request.number] = request
            if len(self._unanswered[engine]) >= 2 * _shard_size(engine):
                with_room.remove(engine)
        return shards

    def _next_request(self) -> NumberedRequest | None:
        if self._requeued:
            return self._requeued.popleft()
        if self._exhausted:
            return None
        number, request = next(self._source, (-1, None))
        if request is None:
            self._exhausted = True
            return None
        return NumberedRequest(number, *request)

    def _receive(self, engine: RemoteEngine, call: Any) -> list[NumberedReply]:
        """The replies of an exchange to requests that were not answered yet."""
        try:
            exchanged = engine.fetch_exchange(call)
        except EngineLost:
            self._requeue(engine)
            return []
        unanswered = self._unanswered[engine]
        replies = [(number, reply) for number, reply in exchanged.replies if unanswered.pop(number, None) is not None]
        if not unanswered:
            self._cancels.pop(engine, None)
        return replies

    def _requeue(self, engine: RemoteEngine) -> None:
        self._requeued.extend(self._unanswered[engine].values())
        self._unanswered[engine] = {}
        self._calls = {call: busy for call, busy in self._calls.items() if busy is not engine}

    def _end(self) -> None:
        """Ends the batch on all engines, unless the cluster was left."""
        if not self._left:
            for engine in self._engines:
                if engine.lost is None and self._unanswered[engine]:
                    engine.end(self._number)


def _shard_size(engine: RemoteEngine) -> int:
    """Requests that are sent to `engine` at once, as long as there are enough."""
    batch = engine.stats.batch if engine.stats is not None else 0
    return max(MIN_SHARD, SHARD_BATCHES * batch)
