"""A prefetcher over a real cache, a fake link, and predictors with known hit rates."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from bench.support.policies.lru import GlobalLRU
from edgemoe.cache import ExpertCache, ExpertId, SlotPool
from edgemoe.cache.slot_classes import limit_slots, slot_classes
from edgemoe.prefetch import prefetcher as module
from edgemoe.prefetch.prefetcher import Prefetcher
from tests.support.cache_fakes import FakeLink, FakeStore
from tests.support.instruments import Clock, FakeGauge

NBYTES = 128
LAYERS = 4
EXPERTS = 12
SURE, LIKELY, UNLIKELY = "sure", "likely", "unlikely"


class Bench:
    """A prefetcher with three predictors of one bin each, with hit rates of 0.9, 0.5 and 0.1."""

    def __init__(
        self, slots: int = 40, gauge: FakeGauge | None = None, nbytes: Sequence[int] = (NBYTES,) * LAYERS
    ) -> None:
        """`slots` is divided among the sizes of records; `nbytes` are the bytes of a record of each layer."""
        store = FakeStore([EXPERTS] * LAYERS, nbytes)
        self.link = FakeLink(store)
        pool = SlotPool(limit_slots(slot_classes(nbytes, store.experts), slots), torch.device("cpu"))
        self.cache = ExpertCache(store, self.link, pool, GlobalLRU())
        self.gauge = gauge or FakeGauge()
        self.prefetcher = Prefetcher(self.cache, LAYERS, self.gauge)
        priors = {SURE: 0.9, LIKELY: 0.5, UNLIKELY: 0.1}
        self.cards = {name: self.prefetcher.register(name, 1, prior) for name, prior in priors.items()}

    def predict(self, predictor: str, layer: int, *numbers: int, resident: Sequence[int] = ()) -> None:
        self.prefetcher.add_prediction(predictor, layer, dict.fromkeys(numbers, 0), resident)

    def use(self, layer: int, *numbers: int) -> None:
        """A pass through one layer, without predictions."""
        self.prefetcher.enter_layer(layer, numbers)
        list(self.cache.borrow(layer, numbers))

    def prefetched(self) -> list[ExpertId]:
        return self.link.happened("prefetch")

    def issue(self, after: int = -1) -> list[ExpertId]:
        """The prefetches that are issued now. All of them arrive immediately."""
        before = len(self.prefetched())
        self.prefetcher.issue(after)
        new = self.prefetched()[before:]
        self.link.finish(*new)
        return new

    def issue_all(self, after: int = -1) -> list[ExpertId]:
        """The prefetches that are issued until no more are. All of them arrive immediately."""
        issued = []
        while new := self.issue(after):
            issued += new
        return issued


def ids(layer: int, *numbers: int) -> list[ExpertId]:
    return [ExpertId(layer, number) for number in numbers]


def paced(bandwidth: float, busy: float, seconds: float, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A bench whose link moves `bandwidth` records per second and whose layers take `seconds` each."""
    clock = Clock(module, monkeypatch)
    bench = Bench(gauge=FakeGauge(bandwidth * NBYTES, busy))
    bench.prefetcher.enter_layer(0, [])
    clock.now += seconds
    bench.prefetcher.enter_layer(1, [])
    return bench
