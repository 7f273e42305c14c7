"""A clock that stands still until told, and a gauge that shows what the test says."""

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
    """A link of so many bytes a second, busy for such a share of the time, and waited for in such a share of that."""

    def __init__(self, speed: float = 0.0, busy: float = 0.0, waited_for: float = 1.0) -> None:
        self.speed = speed
        self.busy = busy
        self.waited_for = waited_for
        self.readings = 0

    def read(self) -> None:
        self.readings += 1
