"""How fast the link is and how busy, over the last moments."""

from __future__ import annotations

import time

from edgemoe.cache import CacheCounters, Link

MOMENT = 0.1
"""Seconds that a reading covers at least."""
NEWEST = 0.25
"""Weight of the newest reading."""


class LinkGauge:
    """Reads a link's totals now and then."""

    def __init__(self, link: Link, counters: CacheCounters | None = None) -> None:
        """`counters` are those of the link's cache, which knows of waits."""
        self.speed = 0.0
        """Bytes a second while it moves something; 0 before anything was moved."""
        self.busy = 0.0
        """Share of the time in which it moves something."""
        self.waited_for = 1.0
        """Share of that time in which a pass stood still for it; what computes meanwhile saves less by it."""
        self._counters = counters
        self._waited = counters.link_wait_seconds if counters else 0.0
        self._link = link
        self._at = time.perf_counter()
        self._seconds, self._nbytes = link.busy_seconds, link.bytes_moved

    def read(self) -> None:
        """Takes a reading if the last one is a moment ago."""
        now = time.perf_counter()
        if now - self._at < MOMENT:
            return
        seconds = self._link.busy_seconds - self._seconds
        nbytes = self._link.bytes_moved - self._nbytes
        self.busy += NEWEST * (min(1.0, seconds / (now - self._at)) - self.busy)
        if seconds > 0 and nbytes > 0:
            speed = nbytes / seconds
            self.speed = speed if not self.speed else self.speed + NEWEST * (speed - self.speed)
        if self._counters is not None and seconds > 0:
            waited = self._counters.link_wait_seconds - self._waited
            self.waited_for += NEWEST * (min(1.0, waited / seconds) - self.waited_for)
            self._waited = self._counters.link_wait_seconds
        self._at = now
        self._seconds, self._nbytes = self._link.busy_seconds, self._link.bytes_moved
