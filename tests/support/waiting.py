"""Waiting for what another thread does."""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE = 60.0
"""Timeout in seconds of a test that waits for a thread."""


def wait_until(condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
    """Waits until `condition` holds. Raises AssertionError after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition does not become true in time"
        time.sleep(0.0005)
