"""The default eviction policy: heat from recent use and from similar past passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from edgemoe.cache.compiled import compiled
from edgemoe.cache.eviction.policy import Evictable, EvictionPolicy
from edgemoe.cache.eviction.routing_history import RoutingHistory
from edgemoe.cache.record import ExpertId

DECAY = 0.75
"""Decay per pass of a past use. Also the upper bound of the discount for a use one pass ahead."""
AVERAGE_PASSES = 512
"""Window in passes of an expert's average use rate, which `heat` returns."""
AVERAGE_WEIGHT = 0.25
"""Weight of the average use rate relative to recent use. It ranks experts without recent use."""
WARM_PASSES = 64
"""Passes that the heat of an earlier run counts for."""
RECENT_WEIGHT = 0.03
"""Weight of recent use against recalled use; equals one recalled pass of similarity 0.56."""
TRUST_PASSES = 512
"""Window of the trust in heat, in passes through single layers."""
SURVIVAL_PASSES = 32
"""Window in passes of the survival of slots."""
MAX_USES, MIN_PASSES = 8.0, 16
"""Cap on the uses a pass of a layer between passes, and the passes after which they are counted."""
MAX_TRIES = 8
"""Candidates that are tried one at a time before all experts are sorted."""

ABSENT, RESIDENT, PREFETCHED = 0, 1, 2
"""States of an expert: without a slot; with a slot; loaded without a request. The third counts as heat 1 until a pass
reaches its layer, since its prediction knows more than the past."""


class HotTemporal(EvictionPolicy):
    """Evicts the coldest expert: the one whose next use is expected to be the furthest away.

    After SpecMoE's HotTemporal (arXiv 2604.10152), which keeps the experts that verification used recently and often;
    the paper does not give its window and decay. Here heat combines two terms. Recent use decays by `DECAY` per pass
    and has a long-run average added. Recalled use is what followed the most similar past passes (`RoutingHistory`); it
    weighs more the more similar those are.

    Two quantities are measured online, since they differ between models and cache sizes. *Survival* is the fraction of
    slots that keep their expert for a pass. It discounts a use one pass ahead, since a use after the eviction is a miss
    anyway. The discount also compares layers: the current layer's next use is a whole pass away, the next layer's is
    not. *Trust* is the slope of the regression of requests on heat. The lower it is, the closer all heats are moved to
    their mean. Under random routing only the order of the layers remains, which gives them equal shares of the slots.

    Only `requested` counts uses; `used` is ignored.
    """

    def __init__(self, experts: Sequence[int], pass_layers: int | None = None) -> None:
        """`experts[layer]` is the number of experts of each layer.

        Passes run the first `pass_layers` of them, all where it is None; others are requested between passes.
        """
        self._pass_layers = len(experts) if pass_layers is None else pass_layers
        # Uses a pass of a layer, as a factor of its heat: those between passes may be requested several times.
        self._uses = np.ones((len(experts), 1), np.float32)
        layers, widest = len(experts), max(experts)
        self._experts = tuple(experts)
        self._recent = np.zeros((layers, widest), np.float32)
        self._average = np.zeros((layers, widest), np.float32)
        self._heat = np.zeros((layers, widest), np.float32)
        self._state = np.full((layers, widest), ABSENT, np.uint8)
        self._passes = [0] * layers
        self._history = RoutingHistory(experts)
        self._recalled = np.zeros(widest, np.float32)
        # Decayed sums over passes: covariance of heat and requests, variance of heat, mean heat, and passes.
        # Their initial values amount to a trust of one half.
        self._sums = np.array([0.5, 1.0, 0.1, 1.0])
        self._held = self._evicted = 0
        self._survival = DECAY
        self._layer: int | None = None
        self._requested: set[int] = set()
        self._pending: list[tuple[int, tuple[int, ...]]] = []
        """Requests of this pass whose heat is not updated yet."""

    def requested(self, layer: int, experts: Sequence[int]) -> None:
        """See the base class."""
        if self._layer is None or layer <= self._layer:
            self._observe_pending()
            if layer < self._pass_layers:
                self._begin_pass()
        self._layer, self._requested = layer, set(experts)
        self._pending.append((layer, tuple(experts)))

    def _observe_pending(self) -> None:
        """Observes the requests that were put off until somebody asks: together they find more in the CPU's caches."""
        for layer, experts in self._pending:
            self._observe(layer, experts)
        self._pending.clear()

    def _observe(self, layer: int, experts: Sequence[int]) -> None:
        """Updates the heat of a layer after a request."""
        self._passes[layer] += 1
        rate = max(1 / self._passes[layer], 1 / AVERAGE_PASSES)
        numbers, count = np.array(experts, np.int64), self._experts[layer]
        weight = self._history.observe(layer, numbers, self._recalled)
        _update_trust(numbers, self._heat[layer, :count], self._sums)
        _update_heat(
            numbers, rate, weight, self._recalled, self._recent[layer], self._average[layer], self._heat[layer]
        )
        _clear_prefetched(self._state[layer])

    def inserted(self, expert: ExpertId) -> None:
        """See the base class."""
        self._observe_pending()
        requested = expert.layer == self._layer and expert.number in self._requested
        self._state[expert] = RESIDENT if requested else PREFETCHED
        self._held += 1

    def used(self, expert: ExpertId) -> None:
        """See the base class."""

    def removed(self, expert: ExpertId) -> None:
        """See the base class."""
        self._state[expert] = ABSENT
        self._held -= 1
        self._evicted += 1

    def victim(self, layer: int, evictable: Evictable) -> ExpertId | None:
        """See the base class."""
        self._observe_pending()
        layers, experts = self._state.shape
        current = layer if self._layer is None else self._layer
        step, offset = self._discount ** (1 / layers), self._offset()
        state, hot = self._state.copy(), self._hot()
        for _ in range(MAX_TRIES):
            index = _coldest(hot, state, current, step, offset)
            if index < 0:
                return None
            expert = ExpertId(*divmod(index, experts))
            if evictable(expert):
                return expert
            state[expert] = ABSENT
        factors = step ** ((np.arange(layers) - current - 1) % layers)
        heat = (np.where(state == PREFETCHED, 1, hot) + offset) * factors[:, None]
        order = np.argsort(np.where(state == ABSENT, np.inf, heat), axis=None, kind="stable")
        others = (ExpertId(*divmod(index, experts)) for index in order[: np.count_nonzero(state)].tolist())
        return next((expert for expert in others if evictable(expert)), None)

    def heat(self) -> dict[ExpertId, float]:
        """The average use rate of each expert over about `AVERAGE_PASSES` passes, 0 to 1; without those never used."""
        self._observe_pending()
        layers, numbers = (found.tolist() for found in np.nonzero(self._average))
        return {ExpertId(*at): float(self._average[at]) for at in zip(layers, numbers, strict=True)}

    def warm(self, heat: Mapping[ExpertId, float]) -> None:
        """See the base class. Values are clamped to 0 to 1."""
        self._observe_pending()
        for expert, rate in heat.items():
            self._heat[expert] = self._average[expert] = min(1.0, max(0.0, rate))
            self._passes[expert.layer] = WARM_PASSES

    def _hot(self) -> np.ndarray:
        """The heat of all experts, by uses a pass."""
        if self._pass_layers == len(self._experts):
            return self._heat
        for layer in range(self._pass_layers, len(self._experts)):
            # Of few passes the ratio says nothing.
            self._uses[layer] = max(1.0, min(MAX_USES, self._passes[layer] / max(self._passes[0], MIN_PASSES)))
        found: np.ndarray = self._heat * self._uses
        return found

    def _begin_pass(self) -> None:
        if self._held:
            evicted = min(1.0, self._evicted / self._held)
            self._survival += (1 - evicted - self._survival) / SURVIVAL_PASSES
        self._evicted = 0
        self._history.begin_pass(self._discount)

    @property
    def _discount(self) -> float:
        """The weight of a use one pass ahead."""
        return min(DECAY, max(0.1, self._survival))

    def _offset(self) -> float:
        """What is added to every heat before a comparison: the mean heat times (1 - trust) / trust."""
        covariance, variance, total, passes = self._sums.tolist()
        trust = min(1.0, max(0.01, covariance / variance))
        return float(total / passes * (1 - trust) / trust)


@compiled(boundscheck=False, error_model="numpy")
def _update_trust(numbers, heat, sums):  # type: ignore[no-untyped-def]
    """Adds a request for experts `numbers` of a layer with `heat`, [experts], to the sums of the regression."""
    mean = heat.mean()
    covariance = variance = 0.0
    for value in heat:
        variance += (value - mean) ** 2
    for number in numbers:
        covariance += heat[number] - mean
    keep = 1 - 1 / TRUST_PASSES
    sums[0] = sums[0] * keep + covariance
    sums[1] = sums[1] * keep + variance
    sums[2] = sums[2] * keep + mean
    sums[3] = sums[3] * keep + 1


@compiled(boundscheck=False, error_model="numpy")
def _update_heat(numbers, rate, weight, recalled, recent, average, heat):  # type: ignore[no-untyped-def]
    """Updates `recent`, `average` and `heat` of a layer, [experts], after a request for experts `numbers`.

    `recalled`, [experts], is a sum over recalled passes whose weights sum to `weight`.
    """
    for number in range(heat.shape[0]):
        recent[number] *= np.float32(DECAY)
        average[number] *= np.float32(1 - rate)
    for number in numbers:
        recent[number] += np.float32(1 - DECAY)
        average[number] += np.float32(rate)
    for number in range(heat.shape[0]):
        past = np.float32(RECENT_WEIGHT) * (recent[number] + np.float32(AVERAGE_WEIGHT) * average[number])
        heat[number] = (recalled[number] + past) / np.float32(weight + RECENT_WEIGHT)


@compiled(boundscheck=False, error_model="numpy")
def _clear_prefetched(state):  # type: ignore[no-untyped-def]
    """Turns the prefetched experts of a layer, whose states are [experts], into plain residents."""
    for number in range(state.shape[0]):
        if state[number] == PREFETCHED:
            state[number] = RESIDENT


@compiled(boundscheck=False, error_model="numpy")
def _coldest(heat, state, current, step, offset):  # type: ignore[no-untyped-def]
    """The flat index of the coldest expert with a slot, or -1. Ties go to the first in the order after `current`.

    `heat` and `state` are [layers, experts]. Each layer after layer `current` counts `step` times the one before it.
    """
    layers, experts = state.shape
    found, lowest, factor = -1, np.inf, 1.0
    for ahead in range(layers):
        layer = (current + 1 + ahead) % layers
        for number in range(experts):
            if state[layer, number] == ABSENT:
                continue
            own = np.float32(1) if state[layer, number] == PREFETCHED else heat[layer, number]
            value = (own + offset) * factor
            if value < lowest:
                found, lowest = layer * experts + number, value
        factor *= step
    return found
