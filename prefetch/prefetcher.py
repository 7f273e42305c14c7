"""Loads predicted experts before their layer requests them, where the prediction is accurate enough to pay."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from edgemoe.cache import ExpertCache, ExpertId, SlotRegion
from edgemoe.prefetch.link_gauge import LinkGauge
from edgemoe.prefetch.scorecard import Scorecard

VICTIM_MISS_RATE = 0.25
"""Probability that the expert which a prefetch evicts is missed soon."""
MAX_IN_FLIGHT = 4
"""Maximum number of prefetches in flight, which limits what a wrong one costs."""


class Prediction(NamedTuple):
    """One predictor's experts of a layer with their bins, and the experts that were resident at the time."""

    bins: Mapping[int, int]
    resident: Collection[int]


class Prefetcher:
    """The predictions for the current pass, and the prefetches made for them. To be used from one thread.

    A layer's predictions are scored when a pass enters it. Prefetches are issued layer by layer, the most probable
    experts of a layer first, and no more at a time than the link can load before a pass enters the layer, given the
    measured time per layer.
    """

    def __init__(self, cache: ExpertCache, layers: int, gauge: LinkGauge) -> None:
        self._cache = cache
        self._gauge = gauge
        self._record_nbytes = cache.store.mean_nbytes
        self._scorecards: dict[str, Scorecard] = {}
        self._predictions: list[dict[str, Prediction]] = [{} for _ in range(layers)]
        self._probabilities: list[dict[ExpertId, float]] = [{} for _ in range(layers)]
        self._queues: list[deque[ExpertId]] = [deque() for _ in range(layers)]
        self._issued: list[dict[ExpertId, str]] = [{} for _ in range(layers)]
        self._layer_seconds = 0.0
        self._entered_at = 0.0
        self._layer = layers

    @property
    def link_busy(self) -> float:
        """Recent fraction of time during which the link was busy."""
        return self._gauge.busy

    @property
    def load_seconds(self) -> float:
        """Seconds that a pass waits for one missing expert; 0 before the first measurement."""
        gauge = self._gauge
        return gauge.wait_share * self._record_nbytes / gauge.bandwidth if gauge.bandwidth else 0.0

    def register(self, predictor: str, bins: int, prior: float) -> Scorecard:
        """Adds a predictor with `bins` bins, which start at hit rate `prior`. Returns its scorecard."""
        self._scorecards[predictor] = Scorecard(bins, prior)
        return self._scorecards[predictor]

    def add_prediction(self, predictor: str, layer: int, bins: Mapping[int, int], resident: Collection[int]) -> None:
        """Sets the prediction of `predictor` for `layer`, in place of its earlier one.

        `bins` gives the bin of each predicted expert; `resident` are the experts that are resident now.
        """
        self._predictions[layer][predictor] = Prediction(bins, resident)
        probabilities: dict[ExpertId, float] = {}
        for name, prediction in self._predictions[layer].items():
            scorecard = self._scorecards[name]
            for number, index in prediction.bins.items():
                expert = ExpertId(layer, number)
                probabilities[expert] = max(probabilities.get(expert, 0.0), scorecard.rate(index))
        self._probabilities[layer] = probabilities
        self._queues[layer] = deque(sorted(probabilities, key=lambda expert: -probabilities[expert]))

    def break_even(self, distance: int, *, in_pass: bool = False) -> float:
        """The minimum probability at which a prefetch for a layer `distance` layers ahead pays.

        A right prefetch saves the part of its load time that the pass would have waited. In a pass (`in_pass`), the
        demand load would follow anyway, so that only idle time of the link is saved; while a draft grows, the link has
        no other work. A wrong prefetch delays other loads as far as the link is busy, and evicts an expert.
        """
        saved = min(1.0, self._loads_before(distance)) * self._gauge.wait_share
        if in_pass:
            saved *= 1 - self._gauge.busy
        lost = self._gauge.busy + VICTIM_MISS_RATE
        return lost / (lost + saved)

    def enter_layer(self, layer: int, requested: Sequence[int]) -> None:
        """A pass enters `layer` and requests experts `requested`: scores predictions, and cancels wrong prefetches."""
        now = time.perf_counter()
        if layer == self._layer + 1:
            seconds = now - self._entered_at
            self._layer_seconds += (seconds - self._layer_seconds) / (16 if self._layer_seconds else 1)
        if layer == 0:
            self._gauge.read()
        self._layer, self._entered_at = layer, now
        experts = set(requested)
        for name, prediction in self._predictions[layer].items():
            self._scorecards[name].score(prediction.bins, experts, prediction.resident)
        self._clear_predictions(layer)
        self._resolve(layer, experts)

    def issue(self, after: int = -1) -> None:
        """Puts on the link what it can load in time, for the layers after `after`; -1 before the first layer."""
        queues = self._queues[after + 1 :]
        if not any(queues):
            return
        in_pass = after >= 0
        bar = self.break_even(1, in_pass=in_pass)
        # Resident experts among them must not be evicted for experts that are needed later.
        keep = {
            expert
            for probabilities in self._probabilities[after + 1 :]
            for expert, probability in probabilities.items()
            if probability >= bar
        }
        full: set[SlotRegion] = set()
        for distance, queue in enumerate(queues, start=1):
            bar = self.break_even(distance, in_pass=in_pass)
            while queue and self._probabilities[queue[0].layer][queue[0]] >= bar:
                if self._cache.prefetching >= min(MAX_IN_FLIGHT, max(1, int(self._loads_before(distance)))):
                    return
                expert = queue[0]
                if not self._cache.holds(expert):
                    region = self._cache.region(expert.layer)
                    if region in full or not self._cache.prefetch([expert], keep):
                        # Layers with slots of another size may still get one.
                        full.add(region)
                        break
                    self._issued[expert.layer][expert] = self._best_predictor(expert)
                queue.popleft()

    def drop(self) -> None:
        """Drops all predictions and cancels their prefetches, after a pass or in place of it."""
        for layer in range(len(self._issued)):
            self._clear_predictions(layer)
            self._resolve(layer, ())

    def _best_predictor(self, expert: ExpertId) -> str:
        """The predictor that gives `expert` the highest probability."""
        rates = {
            name: self._scorecards[name].rate(prediction.bins[expert.number])
            for name, prediction in self._predictions[expert.layer].items()
            if expert.number in prediction.bins
        }
        return max(rates, key=lambda name: rates[name])

    def _resolve(self, layer: int, requested: Collection[int]) -> None:
        """Cancels prefetches for `layer` that were not requested, and counts the bytes of all others."""
        issued, nbytes_of = self._issued[layer], self._cache.store.record_nbytes
        wrong = [expert for expert in issued if expert.number not in requested]
        cancelled = set(self._cache.cancel_prefetches(wrong))
        for expert, predictor in issued.items():
            if expert in cancelled:
                continue
            totals = self._scorecards[predictor].totals
            if expert.number not in requested or not self._cache.holds(expert):
                totals.bytes_wasted += nbytes_of(expert)
            elif self._cache.is_resident(expert):
                totals.bytes_useful += nbytes_of(expert)
            else:
                totals.bytes_late += nbytes_of(expert)
        issued.clear()

    def _clear_predictions(self, layer: int) -> None:
        self._predictions[layer].clear()
        self._probabilities[layer].clear()
        self._queues[layer].clear()

    def _loads_before(self, distance: int) -> float:
        """Records that the link loads while a pass advances by `distance` layers."""
        if not self._gauge.bandwidth or not self._layer_seconds:
            return MAX_IN_FLIGHT
        return self._gauge.bandwidth * self._layer_seconds * distance / self._record_nbytes
