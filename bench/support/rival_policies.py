"""Policies between LRU and LFU that the default is compared with. No engine uses them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from bench.support.lru_policies import BalancedLRU
from edgemoe.cache.policy import Evictable, EvictionPolicy
from edgemoe.cache.record import ExpertId


class LRFU(EvictionPolicy):
    """Least recently and frequently used (Lee et al. 2001): each use counts half as much `half_life` passes later.

    A short half-life makes it LRU, an infinite one LFU. Passes are counted for each layer. Equals leave in the order
    of their last use.
    """

    def __init__(self, half_life: float) -> None:
        self._fade = 0.5 ** (1 / half_life) if math.isfinite(half_life) else 1.0
        self._counts: dict[ExpertId, tuple[float, int]] = {}
        """What the uses of an expert, resident or not, amounted to after the last of them, and when that was."""
        self._passes: dict[int, int] = {}
        self._resident: dict[ExpertId, None] = {}

    def wanted(self, layer: int, experts: Sequence[int]) -> None:
        """See the base class."""
        now = self._passes[layer] = self._passes.get(layer, 0) + 1
        for number in experts:
            self._counts[ExpertId(layer, number)] = self._count(ExpertId(layer, number)) + 1, now

    def inserted(self, expert: ExpertId) -> None:
        """See the base class."""
        self._resident[expert] = None

    def used(self, expert: ExpertId) -> None:
        """See the base class."""
        self._resident[expert] = self._resident.pop(expert)

    def removed(self, expert: ExpertId) -> None:
        """See the base class."""
        del self._resident[expert]

    def victim(self, layer: int, evictable: Evictable) -> ExpertId | None:
        """See the base class."""
        return min(filter(evictable, self._resident), key=self._count, default=None)

    def _count(self, expert: ExpertId) -> float:
        count, last = self._counts.get(expert, (0.0, 0))
        return float(count * self._fade ** (self._passes.get(expert.layer, 0) - last))


class BalancedLRFU(BalancedLRU):
    """`LRFU` within the layer that holds most beyond its equal share."""

    def __init__(self, layers: int, slots: int, half_life: float) -> None:
        super().__init__(layers, slots)
        self._orders = [LRFU(half_life) for _ in range(layers)]

    def wanted(self, layer: int, experts: Sequence[int]) -> None:
        """See the base class."""
        self._orders[layer].wanted(layer, experts)
