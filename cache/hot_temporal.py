"""The default eviction policy: what stays resident follows the text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numba import njit

from edgemoe.cache.policy import Evictable, EvictionPolicy
from edgemoe.cache.record import ExpertId
from edgemoe.cache.routing_history import RoutingHistory

DECAY = 0.75
"""What a use counts one pass later, and at most what a use one pass later counts now: past and future fade alike."""
HABIT = 512
"""Passes over which an expert's usual share is taken. It is what is worth keeping for a next run."""
BACKGROUND = 0.25
"""Weight of the usual share beside what was wanted lately: it decides between experts that were not."""
LEARNT = 64
"""Passes that the heat of an earlier run counts for: soon outweighed by what this text wants."""
DOUBT = 0.03
"""Weight of what was wanted lately against what is recalled: that of one moment a little more than half like now."""
TRUSTED = 512
"""Passes over all layers after which it matters little how well heat foretold what they wanted."""
LIVES = 32
"""Rounds through the layers over which the slots' survival is taken."""
TRIES = 8
"""Experts tried one by one before all of them are put into order."""

OUT, IN, FETCHED = 0, 1, 2
"""Not resident, resident, and brought unasked: counts as wanted at once until a pass reaches its layer, since whoever
brought it knows more than the past."""


class HotTemporal(EvictionPolicy):
    """The coldest leaves, where an expert's heat is how soon it will be wanted, as far as the past tells.

    After SpecMoE's HotTemporal (arXiv 2604.10152), which keeps the experts that verification has seen lately and often;
    its window and its decay are not known. Here an expert is hot for two reasons: it was wanted lately (each use fades
    by `DECAY` a pass, and a slow average stands behind it), and it soon followed earlier moments that resemble this
    one (`RoutingHistory`). The more they resemble it, the more they count.

    Two things are measured while running, since they differ between models and sizes. *Survival*: a use that comes
    after the slot has been given away saves nothing, so a use one round later counts as much as a slot is likely to
    live that long. This discounts what is recalled, and it compares layers: the one just passed waits a whole round,
    the next one does not. *Trust*: the slope of what was wanted over what heat foretold. The less heat foretells, the
    more evenly experts are taken to be wanted; with random routing the layers' order alone decides, which keeps their
    shares equal.

    A pass's experts are those of `wanted`; `used` tells nothing more.
    """

    def __init__(self, experts: Sequence[int]) -> None:
        """`experts[layer]` is the number of experts of each layer."""
        layers, most = len(experts), max(experts)
        self._experts = tuple(experts)
        self._lately = np.zeros((layers, most), np.float32)
        self._usually = np.zeros((layers, most), np.float32)
        self._heat = np.zeros((layers, most), np.float32)
        self._state = np.full((layers, most), OUT, np.uint8)
        self._passes = [0] * layers
        self._moments = RoutingHistory(experts)
        self._soon = np.zeros(most, np.float32)
        # Sums over passes: foretold times wanted and foretold squared, both about their means, foretold, and passes.
        # Before the first, heat is half believed.
        self._record = np.array([0.5, 1.0, 0.1, 1.0])
        self._slots = self._left = 0
        self._survival = DECAY
        self._layer: int | None = None
        self._asked: set[int] = set()

    def wanted(self, layer: int, experts: Sequence[int]) -> None:
        """See the base class."""
        if self._layer is None or layer <= self._layer:
            self._begin()
        self._layer, self._asked = layer, set(experts)
        self._passes[layer] += 1
        rate = max(1 / self._passes[layer], 1 / HABIT)
        now, count = np.array(experts, np.int64), self._experts[layer]
        known = self._moments.follow(layer, now, self._soon)
        _judge(now, self._heat[layer, :count], self._record)
        _warm(now, rate, known, self._soon, self._lately[layer], self._usually[layer], self._heat[layer])
        _settle(self._state[layer])

    def inserted(self, expert: ExpertId) -> None:
        """See the base class."""
        asked = expert.layer == self._layer and expert.number in self._asked
        self._state[expert] = IN if asked else FETCHED
        self._slots += 1

    def used(self, expert: ExpertId) -> None:
        """See the base class."""

    def removed(self, expert: ExpertId) -> None:
        """See the base class."""
        self._state[expert] = OUT
        self._slots -= 1
        self._left += 1

    def victim(self, layer: int, evictable: Evictable) -> ExpertId | None:
        """See the base class."""
        layers, experts = self._state.shape
        now = layer if self._layer is None else self._layer
        step, chance = self._discount ** (1 / layers), self._chance()
        state = self._state.copy()
        for _ in range(TRIES):
            number = _coldest(self._heat, state, now, step, chance)
            if number < 0:
                return None
            expert = ExpertId(*divmod(number, experts))
            if evictable(expert):
                return expert
            state[expert] = OUT
        rounds = step ** ((np.arange(layers) - now - 1) % layers)
        heat = (np.where(state == FETCHED, 1, self._heat) + chance) * rounds[:, None]
        order = np.argsort(np.where(state == OUT, np.inf, heat), axis=None, kind="stable")
        others = (ExpertId(*divmod(number, experts)) for number in order[: np.count_nonzero(state)].tolist())
        return next((expert for expert in others if evictable(expert)), None)

    def heat(self) -> dict[ExpertId, float]:
        """The share of passes that wanted each expert, over the last `HABIT` or so; those never wanted are left out."""
        layers, numbers = (found.tolist() for found in np.nonzero(self._usually))
        return {ExpertId(*at): float(self._usually[at]) for at in zip(layers, numbers, strict=True)}

    def warm(self, heat: Mapping[ExpertId, float]) -> None:
        """See the base class."""
        for expert, share in heat.items():
            self._heat[expert] = self._usually[expert] = min(1.0, max(0.0, share))
            self._passes[expert.layer] = LEARNT

    def _begin(self) -> None:
        """A pass starts at the first layer again."""
        if self._slots:
            gone = min(1.0, self._left / self._slots)
            self._survival += (1 - gone - self._survival) / LIVES
        self._left = 0
        self._moments.begin(self._discount)

    @property
    def _discount(self) -> float:
        """What a use one round later counts now."""
        return min(DECAY, max(0.1, self._survival))

    def _chance(self) -> float:
        """What every heat is raised by before it is compared: the mean, as far as heat is not to be trusted."""
        together, foretold, total, passes = self._record.tolist()
        trust = min(1.0, max(0.01, together / foretold))
        return float(total / passes * (1 - trust) / trust)


@njit(cache=True, boundscheck=False, error_model="numpy")
def _judge(now, heat, record):  # type: ignore[no-untyped-def]
    """Adds to `record` how the heats of a layer's experts, [experts], foretold that `now` would be wanted."""
    mean = heat.mean()
    together = foretold = 0.0
    for value in heat:
        foretold += (value - mean) ** 2
    for expert in now:
        together += heat[expert] - mean
    fade = 1 - 1 / TRUSTED
    record[0] = record[0] * fade + together
    record[1] = record[1] * fade + foretold
    record[2] = record[2] * fade + mean
    record[3] = record[3] * fade + 1


@njit(cache=True, boundscheck=False, error_model="numpy")
def _warm(now, rate, known, soon, lately, usually, heat):  # type: ignore[no-untyped-def]
    """Lets one layer's uses fade, adds those of `now` and writes its heats. All but `now` are [experts]."""
    for expert in range(heat.shape[0]):
        lately[expert] *= np.float32(DECAY)
        usually[expert] *= np.float32(1 - rate)
    for expert in now:
        lately[expert] += np.float32(1 - DECAY)
        usually[expert] += np.float32(rate)
    for expert in range(heat.shape[0]):
        past = np.float32(DOUBT) * (lately[expert] + np.float32(BACKGROUND) * usually[expert])
        heat[expert] = (soon[expert] + past) / np.float32(known + DOUBT)


@njit(cache=True, boundscheck=False, error_model="numpy")
def _settle(state):  # type: ignore[no-untyped-def]
    """A pass has reached the layer: what was brought for it is as hot as its heat says."""
    for expert in range(state.shape[0]):
        if state[expert] == FETCHED:
            state[expert] = IN


@njit(cache=True, boundscheck=False, error_model="numpy")
def _coldest(heat, state, now, step, chance):  # type: ignore[no-untyped-def]
    """The flat index of the coldest resident expert, -1 without any; among equals the first from layer `now` on.

    `heat` and `state` are [layers, experts]; a layer counts `step` times what the one before it counts.
    """
    layers, experts = state.shape
    found, least, factor = -1, np.inf, 1.0
    for ahead in range(layers):
        layer = (now + 1 + ahead) % layers
        for expert in range(experts):
            if state[layer, expert] == OUT:
                continue
            hot = np.float32(1) if state[layer, expert] == FETCHED else heat[layer, expert]
            value = (hot + chance) * factor
            if value < least:
                found, least = layer * experts + expert, value
        factor *= step
    return found
