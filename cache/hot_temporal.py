"""The default eviction policy: what stays resident follows the text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numba import njit

from edgemoe.cache.moments import Moments
from edgemoe.cache.policy import EvictionPolicy, Evictable
from edgemoe.cache.record import ExpertId

DECAY = 0.8
"""What a use counts one pass later, and what a use one pass later counts now: past and future fade alike."""
HABIT = 512
"""Passes over which an expert's usual share is taken, and what is worth keeping for a next run."""
LEARNT = 64
"""Passes that the heat of an earlier run counts for: soon outweighed by what this text wants."""
DOUBT = 0.03
"""Weight of what was wanted lately against what is recalled: that of one moment a little more than half like now."""
CHANCE = 0.25
"""Heat of an expert of which nothing is known. Where all are as cold, the layers' order decides."""
FETCHED = 1.0
"""Heat of what was brought unasked, until a pass reaches its layer: whoever brought it knows more than the past."""
TRIES = 8
"""Experts tried one by one before all of them are put into order."""


class HotTemporal(EvictionPolicy):
    """The coldest leaves, where an expert's heat is how soon it will be wanted, as far as the past tells.

    After SpecMoE's HotTemporal (arXiv 2604.10152), which keeps the experts that verification has seen lately and often;
    its window and its decay are not known. Here an expert is hot for two reasons: it was wanted lately (each use fades
    by `DECAY` a pass, and a slow average stands behind it), and it soon followed earlier moments that resemble this
    one (`Moments`). The more they resemble it, the more they count.

    A heat is that of the moment when a pass was in the expert's layer. Layers are wanted in turn, so the layer just
    passed waits a whole round for its next use and the next layer does not wait: heats of different layers are compared
    after that discount, too. A pass's experts are those of `wanted`; `used` tells nothing more.
    """

    def __init__(self, experts: Sequence[int]) -> None:
        """`experts[layer]` is the number of experts of each layer."""
        layers, most = len(experts), max(experts)
        self._lately = np.zeros((layers, most), np.float32)
        self._usually = np.zeros((layers, most), np.float32)
        self._heat = np.full((layers, most), CHANCE, np.float32)
        self._held = np.zeros((layers, most), np.bool_)
        self._passes = [0] * layers
        self._moments = Moments(experts, DECAY)
        self._soon = np.zeros(most, np.float32)
        # From each layer, how far the next use in every other is discounted.
        ahead = (np.arange(layers)[None, :] - np.arange(layers)[:, None] - 1) % layers
        self._discounts = (DECAY ** (ahead / layers)).astype(np.float32)
        self._layer: int | None = None
        self._asked: set[int] = set()

    def wanted(self, layer: int, experts: Sequence[int]) -> None:
        """See the base class."""
        self._layer, self._asked = layer, set(experts)
        now = np.array(experts, np.int64)
        self._passes[layer] += 1
        known = self._moments.follow(layer, now, self._soon)
        rate = max(1 / self._passes[layer], 1 / HABIT)
        _warm(now, rate, known, self._soon, self._lately[layer], self._usually[layer], self._heat[layer])

    def inserted(self, expert: ExpertId) -> None:
        """See the base class."""
        self._held[expert] = True
        if expert.layer != self._layer or expert.number not in self._asked:
            self._heat[expert] = FETCHED

    def used(self, expert: ExpertId) -> None:
        """See the base class."""

    def removed(self, expert: ExpertId) -> None:
        """See the base class."""
        self._held[expert] = False

    def victim(self, layer: int, evictable: Evictable) -> ExpertId | None:
        """See the base class."""
        discounts = self._discounts[layer if self._layer is None else self._layer]
        left = self._held.copy()
        for _ in range(TRIES):
            number = _coldest(self._heat, discounts, left)
            if number < 0:
                return None
            expert = ExpertId(*divmod(number, left.shape[1]))
            if evictable(expert):
                return expert
            left[expert] = False
        coldest_first = np.argsort(np.where(left, self._heat * discounts[:, None], np.inf), axis=None, kind="stable")
        others = (ExpertId(*divmod(number, left.shape[1])) for number in coldest_first[: left.sum()].tolist())
        return next((expert for expert in others if evictable(expert)), None)

    def heat(self) -> dict[ExpertId, float]:
        """The share of passes that wanted each expert, over the last `HABIT` or so; those never wanted are left out."""
        return {ExpertId(*map(int, at)): float(self._usually[tuple(at)]) for at in np.argwhere(self._usually > 0)}

    def warm(self, heat: Mapping[ExpertId, float]) -> None:
        """See the base class."""
        for expert, share in heat.items():
            self._usually[expert] = min(1.0, max(0.0, share))
            self._passes[expert.layer] = LEARNT
        self._heat[:] = CHANCE + self._usually


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
        past = np.float32(DOUBT) * (lately[expert] + usually[expert])
        heat[expert] = np.float32(CHANCE) + (soon[expert] + past) / np.float32(known + DOUBT)


@njit(cache=True, boundscheck=False, error_model="numpy")
def _coldest(heat, discounts, left):  # type: ignore[no-untyped-def]
    """The flat index of the coldest expert that is `left`, [layers, experts], the first of equals; -1 without any."""
    layers, experts = left.shape
    found, least = -1, np.float32(np.inf)
    for layer in range(layers):
        for expert in range(experts):
            if left[layer, expert]:
                cold = heat[layer, expert] * discounts[layer]
                if cold < least:
                    found, least = layer * experts + expert, cold
    return found
