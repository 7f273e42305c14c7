"""A clock that tests advance, and a link gauge with readings set by tests."""

from __future__ import annotations

from types import ModuleType

import pytest

from edgemoe.prefetch.link_gauge import LinkGauge


class Clock:
    """Stands in for a module's `time`."""

    def __init__(self, module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(module, "time", self)

    def perf_counter(self) -> float:
        return self.now


class FakeGauge(LinkGauge):
    """A gauge with fixed readings. Counts its calls of `read`."""

    def __init__(self, bandwidth: float = 0.0, busy: float = 0.0, wait_share: float = 1.0) -> None:
        self.bandwidth = bandwidth
        self.busy = busy
        self.wait_share = wait_share
        self.readings = 0

    def read(self) -> None:
        self.readings += 1
