"""What the cache and its link did, in experts and in bytes."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass
class CacheCounters:
    """Running totals since the cache was made. A byte that crossed the link is counted exactly once below."""

    hits: int = 0
    """Experts asked for that were resident."""
    misses: int = 0
    """Experts asked for that were not resident, late prefetches included."""
    bytes_demanded: int = 0
    """Bytes loaded because they were asked for."""
    bytes_prefetched_used: int = 0
    """Bytes prefetched and resident before they were asked for."""
    bytes_prefetched_late: int = 0
    """Bytes of prefetches that were asked for while still on the link."""
    bytes_prefetched_wasted: int = 0
    """Bytes prefetched and evicted before anything asked for them."""
    bytes_filled: int = 0
    """Bytes that were brought to fill the slots at the start, once they were asked for or evicted."""
    bytes_hit: int = 0
    """Bytes that did not have to cross the link, because the expert was resident."""
    link_wait_seconds: float = 0.0
    """Time the caller stood still for the link."""

    @property
    def bytes_loaded(self) -> int:
        """All bytes that crossed the link and whose fate is known."""
        prefetched = self.bytes_prefetched_used + self.bytes_prefetched_late + self.bytes_prefetched_wasted
        return self.bytes_demanded + prefetched + self.bytes_filled

    @property
    def hit_rate(self) -> float:
        """Hits over everything asked for; 0 before anything was."""
        return self.hits / max(1, self.hits + self.misses)

    def copy(self) -> CacheCounters:
        """A snapshot, for differences over a stretch of work."""
        return replace(self)
