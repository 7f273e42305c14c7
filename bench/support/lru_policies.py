"""Least-recently-used eviction policies: the baselines for the default policy, and the policy of most tests."""

from __future__ import annotations

from collections import OrderedDict

from edgemoe.cache.policy import Evictable, EvictionPolicy
from edgemoe.cache.record import ExpertId


class GlobalLRU(EvictionPolicy):
    """Least recently used over all layers together."""

    def __init__(self) -> None:
        self._order: OrderedDict[ExpertId, None] = OrderedDict()

    def inserted(self, expert: ExpertId) -> None:
        """See the base class."""
        self._order[expert] = None

    def used(self, expert: ExpertId) -> None:
        """See the base class."""
        self._order.move_to_end(expert)

    def removed(self, expert: ExpertId) -> None:
        """See the base class."""
        del self._order[expert]

    def victim(self, layer: int, evictable: Evictable) -> ExpertId | None:
        """See the base class."""
        return next((expert for expert in self._order if evictable(expert)), None)


class BalancedLRU(EvictionPolicy):
    """Least recently used within the layer that holds most beyond its equal share.

    A prefill asks for most experts of every layer, one layer after the other. Under one global order the
    last layers would crowd the first ones out, which the next token asks for first; equal shares keep
    every layer's recent experts, as mixtral-offloading's LRU per layer does, yet no slot is ever idle.
    """

    def __init__(self, layers: int, slots: int) -> None:
        self._orders: list[EvictionPolicy] = [GlobalLRU() for _ in range(layers)]
        self._held = [0] * layers
        self._share = slots / layers

    def inserted(self, expert: ExpertId) -> None:
        """See the base class."""
        self._orders[expert.layer].inserted(expert)
        self._held[expert.layer] += 1

    def used(self, expert: ExpertId) -> None:
        """See the base class."""
        self._orders[expert.layer].used(expert)

    def removed(self, expert: ExpertId) -> None:
        """See the base class."""
        self._orders[expert.layer].removed(expert)
        self._held[expert.layer] -= 1

    def victim(self, layer: int, evictable: Evictable) -> ExpertId | None:
        """See the base class."""
        if self._held[layer] >= self._share:
            own = self._orders[layer].victim(layer, evictable)
            if own is not None:
                return own
        fullest_first = sorted(range(len(self._held)), key=lambda other: -self._held[other])
        candidates = (self._orders[other].victim(layer, evictable) for other in fullest_first)
        return next((expert for expert in candidates if expert is not None), None)


class ReferenceLRU(EvictionPolicy):
    """The plainest LRU there is, a list scanned from its cold end: the tests' oracle for `GlobalLRU`."""

    def __init__(self) -> None:
        self._coldest_first: list[ExpertId] = []

    def inserted(self, expert: ExpertId) -> None:
        """See the base class."""
        self._coldest_first.append(expert)

    def used(self, expert: ExpertId) -> None:
        """See the base class."""
        self._coldest_first.remove(expert)
        self._coldest_first.append(expert)

    def removed(self, expert: ExpertId) -> None:
        """See the base class."""
        self._coldest_first.remove(expert)

    def victim(self, layer: int, evictable: Evictable) -> ExpertId | None:
        """See the base class."""
        for expert in self._coldest_first:
            if evictable(expert):
                return expert
        return None
