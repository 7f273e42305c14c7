"""Eviction policies between LRU and LFU, as rivals of the default policy. No engine uses them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from bench.support.policies.lru import BalancedLRU
from edgemoe.cache.eviction.policy import Evictable, EvictionPolicy
from edgemoe.cache.record import ExpertId


class LRFU(EvictionPolicy):
    """Least recently and frequently used (Lee et al. 2001): the weight of a use halves every `half_life` passes.

    A short half-life gives LRU, an infinite one LFU. Passes are counted per layer. Ties are broken by LRU.
    """

    def __init__(self, half_life: float) -> None:
        self._decay = 0.5 ** (1 / half_life) if math.isfinite(half_life) else 1.0
        self._counts: dict[ExpertId, tuple[float, int]] = {}
        """The decayed use count of each expert at its last use, and the pass of that use; resident or not."""
        self._passes: dict[int, int] = {}
        self._resident: dict[ExpertId, None] = {}

    def requested(self, layer: int, experts: Sequence[int]) -> None:
        """See the base class."""
        current = self._passes[layer] = self._passes.get(layer, 0) + 1
        for number in experts:
            self._counts[ExpertId(layer, number)] = self._count(ExpertId(layer, number)) + 1, current

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
        return float(count * self._decay ** (self._passes.get(expert.layer, 0) - last))


class BalancedLRFU(BalancedLRU):
    """`LRFU` per layer, with the equal shares of `BalancedLRU`."""

    def __init__(self, layers: int, slots: int, half_life: float) -> None:
        super().__init__(layers, slots)
        self._orders = [LRFU(half_life) for _ in range(layers)]

    def requested(self, layer: int, experts: Sequence[int]) -> None:
        """See the base class."""
        self._orders[layer].requested(layer, experts)
