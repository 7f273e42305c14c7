"""Memory for KV caches: what every cache is charged for, within one limit."""

from __future__ import annotations

from edgemoe.model.kv_cache import SequenceCache, capacity_for
from edgemoe.plan.kv_size import KvSize


class KvBudget:
    """Bytes for the KV caches of one engine. A cache is charged for its capacity, from `charge` to `release`.

    Whoever owns a cache passes its charge on together with the cache. The charges stay within `limit_nbytes`, which
    holds at least one sequence of full length.
    """

    def __init__(self, size: KvSize, limit_nbytes: int, *, at_once: bool = False) -> None:
        """With `at_once`, caches never grow: buffers of many sizes that come and go leave gaps in a device's memory."""
        self.limit_nbytes = limit_nbytes
        self._at_once = at_once
        self._size = size
        self._charges: dict[SequenceCache, int] = {}
        self._total = 0

    @property
    def nbytes(self) -> int:
        """Bytes that are charged."""
        return self._total

    def capacity_for(self, tokens: int, limit: int) -> int:
        """The capacity in tokens of a cache for `tokens` tokens that will hold at most `limit`."""
        return max(tokens, limit) if self._at_once else capacity_for(tokens, limit)

    def nbytes_for(self, capacity: int) -> int:
        """Bytes of a cache for `capacity` tokens."""
        return self._size.nbytes(capacity)

    def charged(self, cache: SequenceCache) -> int:
        """Bytes that `cache` is charged for."""
        return self._charges[cache]

    def fits(self, nbytes: int) -> bool:
        """Whether `nbytes` more are within the limit."""
        return self._total + nbytes <= self.limit_nbytes

    def more_for(self, cache: SequenceCache, capacity: int) -> int:
        """Bytes that `cache` needs beyond its charge for `capacity` tokens."""
        return self.nbytes_for(capacity) - self._charges[cache]

    def charge(self, cache: SequenceCache) -> None:
        """Charges `cache` for its capacity, in place of what it was charged before."""
        nbytes = self.nbytes_for(cache.capacity)
        self._total += nbytes - self._charges.get(cache, 0)
        self._charges[cache] = nbytes

    def release(self, cache: SequenceCache) -> None:
        """Ends the charge of `cache`, which nobody uses any more."""
        self._total -= self._charges.pop(cache)
