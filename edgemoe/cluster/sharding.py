"""One batch of requests over several engines: who has which, and what becomes of those of a lost engine."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from edgemoe.cluster.actor import NOT_BEGUN, NumberedRequest, Outcome
from edgemoe.cluster.remote_engine import EngineLost, RemoteEngine
from edgemoe.errors import EdgeMoEError
from edgemoe.sampling import Sampling

if TYPE_CHECKING:
    from edgemoe.checkpoint.tokenizer import Prompt

MIN_REQUESTS = 16
"""Requests of the smallest shard."""
BATCHES = 2
"""Batches of an engine in one shard. It has two shards, and so as many requests as it reads ahead on its own."""
PATIENCE_SECONDS = 0.25
"""How long an engine waits for an outcome before it answers; a cancel may take as long to reach it."""


class Sharding:
    """One batch, from its requests to its outcomes. Each number comes out exactly once.

    An engine owes the requests that it has been sent until it has answered them. What a lost one owes goes to
    the others before anything new does. Used by one thread, except `cancel` and `leave`.
    """

    def __init__(
        self, number: int, engines: Sequence[RemoteEngine], requests: Iterable[tuple[Prompt, Sampling]]
    ) -> None:
        self._number = number
        self._engines = engines
        self._source = enumerate(requests)
        self._exhausted = False
        self._returned: deque[NumberedRequest] = deque()
        """Requests that lost engines owe."""
        self._owed: dict[RemoteEngine, dict[int, NumberedRequest]] = {engine: {} for engine in engines}
        self._calls: dict[Any, RemoteEngine] = {}
        """Exchanges under way; at most one with each engine, so that their order is known."""
        self._asked: deque[bool] = deque()
        self._cancels: dict[RemoteEngine, bool] = {}
        """Cancels that engines have not been told of yet, and whether they mean what is running."""
        self._stepping = threading.Lock()
        self._left = False

    def outcomes(self) -> Generator[Outcome, None, None]:
        """The outcomes as they come. Raises what an engine raises, and EdgeMoEError when no engine is left."""
        try:
            while not self._done:
                with self._stepping:
                    if self._left:
                        raise EdgeMoEError("the engines are closed: load them again with RayEngines.load")
                    found = self._step()
                yield from found
        finally:
            with self._stepping:
                self._end()

    def cancel(self, *, running: bool) -> None:
        """Ends what is in flight, or what of it has not begun. Thread-safe."""
        self._asked.append(running)

    def leave(self) -> None:
        """Waits for the step in flight; the next one raises. For another thread, before the cluster is left."""
        with self._stepping:
            self._left = True

    @property
    def _done(self) -> bool:
        return self._exhausted and not self._returned and not any(self._owed.values())

    def _step(self) -> list[Outcome]:
        """Gives requests to the engines that have answered, and waits a moment for the outcomes of others."""
        found = self._obey()
        hands = self._deal()
        try:
            ready = self._exchange(hands, 0.0 if found else PATIENCE_SECONDS)
        except ConnectionError as error:
            raise EdgeMoEError(
                f"the connection to the Ray cluster broke ({error}): "
                "what has finished stays; ask for the rest again (edgemoe run --resume)"
            ) from error
        for call in ready:
            found += self._receive(self._calls.pop(call), call)
        return found

    def _obey(self) -> list[Outcome]:
        """Notes new cancels for every engine; gives out what no engine has as cancelled."""
        found: list[Outcome] = []
        while self._asked:
            running = self._asked.popleft()
            for engine in self._engines:
                if self._owed[engine]:
                    self._cancels[engine] = running or self._cancels.get(engine, False)
            found += [(request.number, NOT_BEGUN) for request in self._returned]
            self._returned.clear()
        return found

    def _exchange(self, hands: dict[RemoteEngine, list[NumberedRequest]], patience: float) -> list[Any]:
        """Calls the free engines that owe something, and waits up to `patience` seconds for the first to answer."""
        import ray

        if not ray.is_initialized():
            raise ConnectionError("it has been closed")
        for engine, hand in hands.items():
            if self._owed[engine]:
                cancel = self._cancels.pop(engine, None)
                self._calls[engine.exchange(self._number, hand, cancel, PATIENCE_SECONDS)] = engine
        if not self._calls:
            return []
        ready: list[Any] = ray.wait(list(self._calls), timeout=patience)[0]
        return ready

    def _free(self) -> list[RemoteEngine]:
        """Engines that can be sent something. What lost ones owe is taken back. Raises when none is left."""
        for engine in self._engines:
            if engine.lost is not None:
                self._take_back(engine)
        reasons = [f"node {engine.node}: {engine.lost}" for engine in self._engines if engine.lost is not None]
        if len(reasons) == len(self._engines):
            raise EdgeMoEError(
                f"all engines of the Ray cluster are gone ({'; '.join(reasons)}): what has finished stays; see in "
                "'ray status' what is left, and ask for the rest again (edgemoe run --resume)"
            )
        busy = set(self._calls.values())
        return [engine for engine in self._engines if engine.lost is None and engine not in busy]

    def _deal(self) -> dict[RemoteEngine, list[NumberedRequest]]:
        """Gives each request to whom of the free engines owes fewest, while they have room; marks it as owed."""
        free = self._free()
        hands: dict[RemoteEngine, list[NumberedRequest]] = {engine: [] for engine in free}
        with_room = [engine for engine in free if len(self._owed[engine]) <= _shard(engine)]
        while with_room:
            request = self._next_request()
            if request is None:
                break
            engine = min(with_room, key=lambda engine: len(self._owed[engine]))
            hands[engine].append(request)
            self._owed[engine][request.number] = request
            if len(self._owed[engine]) >= 2 * _shard(engine):
                with_room.remove(engine)
        return hands

    def _next_request(self) -> NumberedRequest | None:
        if self._returned:
            return self._returned.popleft()
        if self._exhausted:
            return None
        number, request = next(self._source, (-1, None))
        if request is None:
            self._exhausted = True
            return None
        return NumberedRequest(number, *request)

    def _receive(self, engine: RemoteEngine, call: Any) -> list[Outcome]:
        """The outcomes of an exchange that were still owed."""
        try:
            exchanged = engine.fetch_exchange(call)
        except EngineLost:
            self._take_back(engine)
            return []
        owed = self._owed[engine]
        found = [(number, outcome) for number, outcome in exchanged.outcomes if owed.pop(number, None) is not None]
        if not owed:
            self._cancels.pop(engine, None)
        return found

    def _take_back(self, engine: RemoteEngine) -> None:
        self._returned.extend(self._owed[engine].values())
        self._owed[engine] = {}
        self._calls = {call: busy for call, busy in self._calls.items() if busy is not engine}

    def _end(self) -> None:
        """Ends what is under way, unless the cluster has been left."""
        if not self._left:
            for engine in self._engines:
                if engine.lost is None and self._owed[engine]:
                    engine.end(self._number)


def _shard(engine: RemoteEngine) -> int:
    """Requests that go to `engine` in one piece, where there are so many."""
    batch = engine.stats.batch if engine.stats is not None else 0
    return max(MIN_REQUESTS, BATCHES * batch)
