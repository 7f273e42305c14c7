"""Whose turn it is: how many replies run at once, and who comes next."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from edgemoe.server.protocols.errors import ApiError


class Turns:
    """Lets a number of replies run; the others wait. Requests take turns, so that one with many replies starves none.

    Used by one event loop.
    """

    def __init__(self, running: int, requests: int) -> None:
        """Lets `running` replies run, of at most `requests` requests."""
        self._free = running
        self._max_requests = requests
        self._waiting: dict[object, deque[asyncio.Future[None]]] = {}
        """By request, the one whose turn is next first."""
        self.running = 0
        """Replies that run."""
        self.requests = 0
        """Requests that are answered or wait."""

    @property
    def waiting(self) -> int:
        """Replies that wait."""
        return sum(map(len, self._waiting.values()))

    @asynccontextmanager
    async def request(self) -> AsyncIterator[None]:
        """The time of one request. Raises ApiError, 429, where there are too many."""
        if self.requests >= self._max_requests:
            raise ApiError(429, f"{self.requests} requests are waiting already: try again later", retry_after=1)
        self.requests += 1
        try:
            yield
        finally:
            self.requests -= 1

    @asynccontextmanager
    async def turn(self, request: object) -> AsyncIterator[None]:
        """The time of one of the replies to `request`; entering it waits for its turn."""
        await self._take(request)
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1
            self._give()

    async def _take(self, request: object) -> None:
        if self._free:
            self._free -= 1
            return
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(request, deque()).append(mine)
        try:
            await mine
        except asyncio.CancelledError:
            if mine.done() and not mine.cancelled():
                # The turn came at the same moment.
                self._give()
            else:
                self._forget(request, mine)
            raise

    def _give(self) -> None:
        """Gives a turn to the next one that has not been cancelled."""
        while self._waiting:
            request = next(iter(self._waiting))
            line = self._waiting.pop(request)
            following = line.popleft()
            if line:
                # Behind all others.
                self._waiting[request] = line
            if not following.done():
                following.set_result(None)
                return
        self._free += 1

    def _forget(self, request: object, mine: asyncio.Future[None]) -> None:
        line = self._waiting.get(request, deque())
        if mine in line:
            line.remove(mine)
            if not line:
                del self._waiting[request]
