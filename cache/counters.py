"""Totals of the cache and its link, in experts and in bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from edgemoe.cache.resident import LoadReason, Resident


@dataclass
class CacheCounters:
    """Running totals since the cache was created. Each byte that crossed the link is counted in exactly one of them."""

    hits: int = 0
    """Requested experts that were resident."""
    misses: int = 0
    """Requested experts that were not resident, late prefetches included."""
    computed_by_cpu: int = 0
    """Misses that were not loaded, as the CPU computed them beside a device. They moved no bytes."""
    bytes_demanded: int = 0
    """Bytes of demand loads."""
    bytes_prefetched_used: int = 0
    """Bytes of prefetches that arrived before their request."""
    bytes_prefetched_late: int = 0
    """Bytes of prefetches that were still in flight at their request."""
    bytes_prefetched_wasted: int = 0
    """Bytes of prefetches that were evicted without a request."""
    bytes_filled: int = 0
    """Bytes of initial fills, counted at their first request or their eviction."""
    bytes_hit: int = 0
    """Bytes of hits, which did not have to cross the link."""
    link_wait_seconds: float = 0.0
    """Time that the caller spent waiting for the link."""

    @property
    def bytes_loaded(self) -> int:
        """All bytes that crossed the link, except those of prefetches and fills that are still unused."""
        prefetched = self.bytes_prefetched_used + self.bytes_prefetched_late + self.bytes_prefetched_wasted
        return self.bytes_demanded + prefetched + self.bytes_filled

    @property
    def hit_rate(self) -> float:
        """Hits over requested experts; 0 before the first request."""
        return self.hits / max(1, self.hits + self.misses)

    def copy(self) -> CacheCounters:
        """A snapshot, for differences between two points in time."""
        return replace(self)

    def hit(self, held: Sequence[Resident], nbytes: int) -> None:
        """Counts a request that found `held`, whose records have `nbytes` each."""
        self.hits += len(held)
        self.bytes_hit += nbytes * len(held)
        for each in held:
            if each.load_reason is not None:
                self.bytes_prefetched_used += self.resolve(each, nbytes)

    def missed_elsewhere(self, experts: int) -> None:
        """Counts requested experts without a slot that are computed from their records in RAM."""
        self.misses += experts
        self.computed_by_cpu += experts

    def resolve(self, held: Resident, nbytes: int) -> int:
        """Clears the load reason at the first request or the eviction of `held`, and counts the bytes of a fill.

        Returns `nbytes` for a prefetch, 0 for others.
        """
        reason, held.load_reason = held.load_reason, None
        if reason is LoadReason.FILL:
            self.bytes_filled += nbytes
        return nbytes if reason is LoadReason.PREFETCH else 0
