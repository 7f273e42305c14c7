"""Requests that wait to run, in an order that puts common prefixes next to one another."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgemoe.request.request import Request

QueuePlace = tuple[bytes, int]
"""A request's token key and its arrival number: the order of the queue."""


class WaitingQueue:
    """Goes round in the order of the requests' tokens, so that neighbours share as much as they can.

    Nobody waits for ever: the request that arrived as number i is taken as number i + `patience` at the
    latest, preempted ones not counted.
    """

    def __init__(self, patience: int) -> None:
        self._patience = patience
        self._preempted: deque[Request] = deque()
        self._places: list[QueuePlace] = []
        self._waiting: dict[int, Request] = {}
        self._arrived = 0
        self._taken = 0
        self._last: QueuePlace = (b"", -1)

    def __len__(self) -> int:
        return len(self._preempted) + len(self._places)

    def __iter__(self) -> Iterator[Request]:
        yield from self._preempted
        yield from self._waiting.values()

    def add(self, request: Request) -> None:
        """Adds a new request."""
        insort(self._places, (request.key, self._arrived))
        self._waiting[self._arrived] = request
        self._arrived += 1

    def put_back(self, request: Request) -> None:
        """Puts a preempted request first."""
        self._preempted.appendleft(request)

    def first(self) -> Request:
        """The next request, which stays in the queue. The queue must not be empty."""
        return self._preempted[0] if self._preempted else self._waiting[self._next()[1]]

    def take_first(self) -> Request:
        """Removes and returns the next request."""
        if self._preempted:
            return self._preempted.popleft()
        self._last = self._next()
        self._taken += 1
        return self._remove(self._last)

    def remove_if(self, unwanted: set[Request]) -> None:
        """Removes the requests in `unwanted`."""
        self._preempted = deque(each for each in self._preempted if each not in unwanted)
        for number in [number for number, each in self._waiting.items() if each in unwanted]:
            self._remove((self._waiting[number].key, number))
            # They count as taken, so that the promise to those who stay is kept.
            self._taken += 1

    def _next(self) -> QueuePlace:
        oldest = next(iter(self._waiting))
        if self._taken >= oldest + self._patience:
            return self._waiting[oldest].key, oldest
        at = bisect_right(self._places, self._last)
        return self._places[at % len(self._places)]

    def _remove(self, place: QueuePlace) -> Request:
        del self._places[bisect_left(self._places, place)]
        return self._waiting.pop(place[1])
