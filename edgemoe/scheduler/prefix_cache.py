"""Finds prompts with a common prefix: running requests, and the KV caches of the latest finished ones."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from heapq import merge
from typing import NamedTuple

from edgemoe.errors import is_out_of_memory
from edgemoe.model.kv_cache import SequenceCache
from edgemoe.request.token_key import TOKEN_NBYTES, shared_tokens, token_key
from edgemoe.scheduler.kv_budget import KvBudget


class CachedPrefix(NamedTuple):
    """A KV cache that the prefix cache owns, and the key of its tokens."""

    key: bytes
    cache: SequenceCache


class PrefixMatch(NamedTuple):
    """The KV cache that shares most with a prompt, and how many of its tokens may be used."""

    cache: SequenceCache
    tokens: int
    prefix: CachedPrefix | None
    """The entry that owns it; None where it belongs to a running request, from which it can only be copied."""


class PrefixCache:
    """Owns the KV caches of finished requests, at most `max_kept`, and knows those of running ones.

    A cache that is kept stays charged to `budget` until it is taken or evicted, the least recently used one first.
    """

    def __init__(self, budget: KvBudget, max_kept: int) -> None:
        self._budget = budget
        self._max_kept = max_kept
        self._kept: list[CachedPrefix] = []
        self._running: list[tuple[bytes, int]] = []
        self._caches: dict[int, SequenceCache] = {}

    @property
    def kept(self) -> Sequence[CachedPrefix]:
        """The entries, the least recently used one first."""
        return tuple(self._kept)

    def watch(self, key: bytes, number: int, cache: SequenceCache) -> None:
        """Adds running request `number`, whose prompt has the key `key`; its cache stays its own."""
        insort(self._running, (key, number))
        self._caches[number] = cache

    def unwatch(self, key: bytes, number: int) -> None:
        """Removes running request `number`."""
        del self._running[bisect_left(self._running, (key, number))]
        del self._caches[number]

    def keep(self, tokens: Sequence[int], cache: SequenceCache) -> None:
        """Takes ownership of the charged `cache` of `tokens`; evicts beyond `max_kept` entries."""
        self._kept.append(CachedPrefix(token_key(tokens), cache))
        while len(self._kept) > self._max_kept:
            self._evict()

    def keep_trimmed(self, tokens: Sequence[int], cache: SequenceCache) -> None:
        """As `keep`, in no more memory than it needs; where there is none left for that it is released instead."""
        try:
            cache.trim()
        except Exception as error:
            self._budget.release(cache)
            if not is_out_of_memory(error):
                raise
        else:
            self.keep(tokens, cache)

    def keep_copy(self, tokens: Sequence[int], cache: SequenceCache) -> None:
        """Keeps a copy of the `cache` of `tokens` and charges it; nothing where there is no memory for one."""
        try:
            copy = cache.fork(cache.tokens, cache.tokens)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        else:
            self._budget.charge(copy)
            self.keep(tokens, copy)

    def take(self, prefix: CachedPrefix) -> SequenceCache:
        """Removes an entry and ends its charge; its cache belongs to the caller."""
        self._remove(prefix)
        self._budget.release(prefix.cache)
        return prefix.cache

    def touch(self, prefix: CachedPrefix) -> None:
        """Makes an entry the most recently used one."""
        self._remove(prefix)
        self._kept.append(prefix)

    def evict_for(self, nbytes: int) -> list[CachedPrefix]:
        """Evicts entries until `nbytes` more fit the budget or none is left; returns them, which nobody owns."""
        evicted = []
        while self._kept and not self._budget.fits(nbytes):
            evicted.append(self._evict())
        return evicted

    def clear(self) -> None:
        """Evicts all entries."""
        while self._kept:
            self._evict()

    def best(self, key: bytes) -> PrefixMatch | None:
        """The cache with the longest usable prefix of the prompt `key`; None where no token can be used.

        At least one token of the prompt is left over, whose logits start the reply.
        """
        found = [
            PrefixMatch(kept.cache, self._usable(key, shared_tokens(key, kept.key), kept.cache), kept)
            for kept in self._kept
        ]
        best = max(found, key=lambda match: match.tokens, default=None)
        for shared, number in self._nearest(key):
            if best is not None and shared <= best.tokens:
                break
            cache = self._caches[number]
            if cache.can_crop():
                match = PrefixMatch(cache, self._usable(key, shared, cache), None)
                best = max(best or match, match, key=lambda match: match.tokens)
        return best if best is not None and best.tokens > 0 else None

    def coming(self, key: bytes) -> tuple[int, int] | None:
        """The running request whose prompt shares most with `key`, and how many tokens, computed or not."""
        tokens, number = next(self._nearest(key), (0, -1))
        return (number, tokens) if tokens else None

    def _nearest(self, key: bytes) -> Iterator[tuple[int, int]]:
        """Shared tokens and number of each running request, the most shared tokens first."""
        at = bisect_left(self._running, (key, -1))
        # In the order of tokens, the number of shared tokens falls to both sides.
        sides = reversed(self._running[:at]), self._running[at:]
        shared = [((shared_tokens(key, other), number) for other, number in side) for side in sides]
        return merge(*shared, key=lambda each: each[0], reverse=True)

    def _remove(self, prefix: CachedPrefix) -> None:
        # By identity: comparing would compare keys, and two entries may have the same tokens.
        self._kept = [each for each in self._kept if each is not prefix]

    def _evict(self) -> CachedPrefix:
        prefix = self._kept.pop(0)
        self._budget.release(prefix.cache)
        return prefix

    @staticmethod
    def _usable(key: bytes, shared: int, cache: SequenceCache) -> int:
        # A running request's cache may have fewer tokens than its prompt, or those of its reply, which the key lacks.
        shared = min(shared, cache.tokens, len(key) // TOKEN_NBYTES - 1)
        return shared if shared == cache.tokens or cache.can_crop() else 0
