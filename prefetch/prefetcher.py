"""Brings the experts that predictors name before they are asked for, while they are right often enough."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from edgemoe.cache import ExpertCache, ExpertId
from edgemoe.prefetch.link_gauge import LinkGauge
from edgemoe.prefetch.scorecard import Scorecard

VICTIM_WANTED = 0.25
"""How likely what a prefetch evicts is to be missed soon."""
MAX_ON_THE_WAY = 4
"""Prefetches on the link at a time, so that one that is called off has not cost much."""


class Prediction(NamedTuple):
    """What one predictor says of a layer: the bin of each expert that it names, and what was resident then."""

    bins: Mapping[int, int]
    resident: Collection[int]


class Prefetcher:
    """The predictions for the pass under way, and the loads that are made of them. Used from one thread.

    A layer's predictions are settled when a pass reaches it. Loads go out in the order of the layers, likeliest
    first, no more at a time than the link brings before their layer is reached, by the measured time of a layer.
    """

    def __init__(self, cache: ExpertCache, layers: int, gauge: LinkGauge) -> None:
        self._cache = cache
        self._gauge = gauge
        self._scorecards: dict[str, Scorecard] = {}
        self._predictions: list[dict[str, Prediction]] = [{} for _ in range(layers)]
        self._likely: list[dict[ExpertId, float]] = [{} for _ in range(layers)]
        self._queues: list[deque[ExpertId]] = [deque() for _ in range(layers)]
        self._brought: list[dict[ExpertId, str]] = [{} for _ in range(layers)]
        self._layer_seconds = 0.0
        self._reached_at = 0.0
        self._reached = layers

    @property
    def link_busy(self) -> float:
        """Share of the last moments in which the link moved something."""
        return self._gauge.busy

    @property
    def load_seconds(self) -> float:
        """How long a pass waits for one expert that it lacks; 0 while no load was measured."""
        gauge = self._gauge
        return gauge.waited_for * self._cache.pool.slot_nbytes / gauge.speed if gauge.speed else 0.0

    def watch(self, predictor: str, bins: int, prior: float) -> Scorecard:
        """The scorecard of a new predictor whose foretellings fall into `bins` bins."""
        self._scorecards[predictor] = Scorecard(bins, prior)
        return self._scorecards[predictor]

    def add_prediction(self, predictor: str, layer: int, bins: Mapping[int, int], resident: Collection[int]) -> None:
        """`predictor` names experts of `layer` with their bins, in place of what it said before of that layer."""
        self._predictions[layer][predictor] = Prediction(bins, resident)
        likely: dict[ExpertId, float] = {}
        for name, prediction in self._predictions[layer].items():
            rates = self._scorecards[name]
            for number, kind in prediction.bins.items():
                expert = ExpertId(layer, number)
                likely[expert] = max(likely.get(expert, 0.0), rates.rate(kind))
        self._likely[layer] = likely
        self._queues[layer] = deque(sorted(likely, key=lambda expert: -likely[expert]))

    def break_even(self, distance: int, *, in_pass: bool = False) -> float:
        """How likely an expert of a layer `distance` layers ahead must be for its load to pay.

        A right load saves the part of its time for which the pass would have waited. While a draft grows the link has
        nothing else to do; `in_pass` it saves only what the link would have idled for, since the load is made anyway.
        A wrong load takes the link from others, as far as it is busy, and an expert from its slot.
        """
        saved = min(1.0, self._in_time(distance)) * self._gauge.waited_for
        if in_pass:
            saved *= 1 - self._gauge.busy
        lost = self._gauge.busy + VICTIM_WANTED
        return lost / (lost + saved)

    def enter_layer(self, layer: int, wanted: Sequence[int]) -> None:
        """A pass asks for `wanted` of `layer`: settles what was said of it, and calls off what was wrong."""
        now = time.perf_counter()
        if layer == self._reached + 1:
            seconds = now - self._reached_at
            self._layer_seconds += (seconds - self._layer_seconds) / (16 if self._layer_seconds else 1)
        if layer == 0:
            self._gauge.read()
        self._reached, self._reached_at = layer, now
        asked = set(wanted)
        for name, prediction in self._predictions[layer].items():
            self._scorecards[name].settle(prediction.bins, asked, prediction.resident)
        self._forget(layer)
        self._settle(layer, asked)

    def issue(self, after: int = -1) -> None:
        """Puts on the link what it can bring in time, for the layers behind `after`, the one that a pass is in."""
        queues = self._queues[after + 1 :]
        if not any(queues):
            return
        in_pass = after >= 0
        least = self.break_even(1, in_pass=in_pass)
        # What is there already as well: it must not leave for what is wanted later.
        keep = {expert for likely in self._likely[after + 1 :] for expert, rate in likely.items() if rate >= least}
        for distance, queue in enumerate(queues, start=1):
            least = self.break_even(distance, in_pass=in_pass)
            while queue and self._likely[queue[0].layer][queue[0]] >= least:
                if self._cache.prefetching >= min(MAX_ON_THE_WAY, max(1, int(self._in_time(distance)))):
                    return
                expert = queue[0]
                if not self._cache.holds(expert):
                    if not self._cache.prefetch([expert], keep):
                        return
                    self._brought[expert.layer][expert] = self._namer(expert)
                queue.popleft()

    def drop(self) -> None:
        """The pass is over, or will not be made: forgets what was said, and calls off what has not moved yet."""
        for layer in range(len(self._brought)):
            self._forget(layer)
            self._settle(layer, ())

    def _namer(self, expert: ExpertId) -> str:
        """The predictor that was surest of it."""
        said = self._predictions[expert.layer]
        sure = {
            name: self._scorecards[name].rate(told.bins[expert.number])
            for name, told in said.items()
            if expert.number in told.bins
        }
        return max(sure, key=lambda name: sure[name])

    def _settle(self, layer: int, asked: Collection[int]) -> None:
        """Calls off what was brought for `layer` in vain, and counts what has moved by who named it."""
        brought, nbytes_of = self._brought[layer], self._cache.store.record_nbytes
        wrong = [expert for expert in brought if expert.number not in asked]
        called_off = set(self._cache.call_off(wrong))
        for expert, predictor in brought.items():
            if expert in called_off:
                continue
            totals = self._scorecards[predictor].totals
            if expert.number not in asked or not self._cache.holds(expert):
                totals.bytes_wasted += nbytes_of(expert)
            elif self._cache.is_resident(expert):
                totals.bytes_useful += nbytes_of(expert)
            else:
                totals.bytes_late += nbytes_of(expert)
        brought.clear()

    def _forget(self, layer: int) -> None:
        self._predictions[layer].clear()
        self._likely[layer].clear()
        self._queues[layer].clear()

    def _in_time(self, distance: int) -> float:
        """Records that the link brings while a pass gets `distance` layers further."""
        if not self._gauge.speed or not self._layer_seconds:
            return MAX_ON_THE_WAY
        return self._gauge.speed * self._layer_seconds * distance / self._cache.pool.slot_nbytes
