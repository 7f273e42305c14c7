"""Pasts that later requests may begin with: those of running sequences, and the latest of finished ones."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from heapq import merge
from typing import NamedTuple

from edgemoe.model.kv_cache import SequenceCache
from edgemoe.request.token_key import WIDTH, shared_tokens, token_key


class CachedPrefix(NamedTuple):
    """A past of its own that nobody computes on."""

    key: bytes
    cache: SequenceCache
    nbytes: int


class PrefixMatch(NamedTuple):
    """The past that shares most with a prompt, and how many of its tokens may be taken over."""

    cache: SequenceCache
    tokens: int
    kept: CachedPrefix | None
    """Where it is a kept one."""


class PrefixCache:
    """Finds shared beginnings. Running pasts are looked at, kept ones are owned until they are taken or dropped."""

    def __init__(self, max_kept: int) -> None:
        self._max_kept = max_kept
        self._kept: list[CachedPrefix] = []
        self._running: list[tuple[bytes, int]] = []
        self._caches: dict[int, SequenceCache] = {}

    @property
    def nbytes(self) -> int:
        """What the kept pasts are charged with."""
        return sum(kept.nbytes for kept in self._kept)

    def watch(self, key: bytes, number: int, cache: SequenceCache) -> None:
        """Looks at the past of running request `number`, whose prompt is `key`."""
        insort(self._running, (key, number))
        self._caches[number] = cache

    def unwatch(self, key: bytes, number: int) -> None:
        """Looks at it no more."""
        del self._running[bisect_left(self._running, (key, number))]
        del self._caches[number]

    def keep(self, tokens: Sequence[int], cache: SequenceCache, nbytes: int) -> None:
        """Owns the past of `tokens`, charged with `nbytes`; the one that was not used longest goes for it."""
        self._kept.append(CachedPrefix(token_key(tokens), cache, nbytes))
        while len(self._kept) > self._max_kept:
            self.drop_oldest()

    def drop_oldest(self) -> bool:
        """Gives back the kept past that was not used longest; whether there was one."""
        if not self._kept:
            return False
        del self._kept[0]
        return True

    def take(self, kept: CachedPrefix) -> None:
        """Gives `kept` away: its past belongs to the caller."""
        self._kept = [each for each in self._kept if each is not kept]

    def owns(self, kept: CachedPrefix) -> bool:
        """Whether `kept` is still here."""
        return any(each is kept for each in self._kept)

    def touch(self, kept: CachedPrefix) -> None:
        """`kept` was of use."""
        self.take(kept)
        self._kept.append(kept)

    def best(self, key: bytes) -> PrefixMatch | None:
        """The past with the longest beginning of the prompt `key` that may be taken over; None where none has any.

        At least one token of the prompt is left over, whose logits start the reply.
        """
        found = [
            PrefixMatch(kept.cache, self._usable(key, shared_tokens(key, kept.key), kept.cache), kept)
            for kept in self._kept
        ]
        best = max(found, key=lambda match: match.tokens, default=None)
        for shared, number in self._alike(key):
            if best is not None and shared <= best.tokens:
                break
            cache = self._caches[number]
            if cache.can_crop():
                match = PrefixMatch(cache, self._usable(key, shared, cache), None)
                best = max(best or match, match, key=lambda match: match.tokens)
        return best if best is not None and best.tokens > 0 else None

    def coming(self, key: bytes) -> tuple[int, int] | None:
        """The running request whose prompt shares most with `key`, and how many tokens, computed or not yet."""
        tokens, number = next(self._alike(key), (0, -1))
        return (number, tokens) if tokens else None

    def _alike(self, key: bytes) -> Iterator[tuple[int, int]]:
        """The running prompts, those first that share most with `key`: tokens and number of each."""
        at = bisect_left(self._running, (key, -1))
        # In the order of tokens, what is shared falls off to both sides.
        sides = reversed(self._running[:at]), self._running[at:]
        shared = [((shared_tokens(key, other), number) for other, number in side) for side in sides]
        return merge(*shared, key=lambda each: each[0], reverse=True)

    @staticmethod
    def _usable(key: bytes, shared: int, cache: SequenceCache) -> int:
        # The past of a running prompt may be shorter than the prompt, or longer by the reply, which is not in its key.
        shared = min(shared, cache.tokens, len(key) // WIDTH - 1)
        return shared if shared == cache.tokens or cache.can_crop() else 0
