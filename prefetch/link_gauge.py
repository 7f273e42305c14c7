"""Measures the bandwidth and the load of a link."""

from __future__ import annotations

import time

from edgemoe.cache import CacheCounters, Link

MIN_INTERVAL = 0.1
"""Minimum seconds between two readings."""
NEWEST_WEIGHT = 0.25
"""Weight of the newest reading in the moving averages."""


class LinkGauge:
    """Exponential moving averages over the totals of a link."""

    def __init__(self, link: Link, counters: CacheCounters | None = None) -> None:
        """`counters` are those of the link's cache. Without them, `wait_share` stays 1."""
        self.bandwidth = 0.0
        """Bytes per second while the link is busy; 0 before the first transfer."""
        self.busy = 0.0
        """Fraction of time during which the link is busy."""
        self.wait_share = 1.0
        """Fraction of the busy time during which a pass waits for the link, instead of computing meanwhile."""
        self._counters = counters
        self._waited = counters.link_wait_seconds if counters else 0.0
        self._link = link
        self._read_at = time.perf_counter()
        self._seconds, self._nbytes = link.busy_seconds, link.bytes_moved

    def read(self) -> None:
        """Takes a reading, unless the last one is less than `MIN_INTERVAL` ago."""
        now = time.perf_counter()
        if now - self._read_at < MIN_INTERVAL:
            return
        seconds = self._link.busy_seconds - self._seconds
        nbytes = self._link.bytes_moved - self._nbytes
        self.busy += NEWEST_WEIGHT * (min(1.0, seconds / (now - self._read_at)) - self.busy)
        if seconds > 0 and nbytes > 0:
            newest = nbytes / seconds
            self.bandwidth += (newest - self.bandwidth) * (NEWEST_WEIGHT if self.bandwidth else 1)
        if self._counters is not None and seconds > 0:
            waited = self._counters.link_wait_seconds - self._waited
            self.wait_share += NEWEST_WEIGHT * (min(1.0, waited / seconds) - self.wait_share)
            self._waited = self._counters.link_wait_seconds
        self._read_at = now
        self._seconds, self._nbytes = self._link.busy_seconds, self._link.bytes_moved
