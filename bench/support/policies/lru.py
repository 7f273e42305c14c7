"""LRU eviction policies: baselines for the default policy, and stand-ins for it in tests. No engine uses them."""

from __future__ import annotations

from collections import OrderedDict

from edgemoe.cache.eviction.policy import Evictable, EvictionPolicy
from edgemoe.cache.record import ExpertId


class GlobalLRU(EvictionPolicy):
    """Evicts the least recently used expert of all layers."""

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
    """LRU with equal shares: a layer below its share of the slots evicts from the fullest one, others from themselves.

    A prefill requests most experts of every layer, one layer after the other. Under one global order the last layers
    would evict the experts of the first ones, which the next token requests first. Equal shares keep recent experts of
    each layer, as the LRU per layer of mixtral-offloading does, but leave no slot idle.
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
    """A plain LRU over a list: the reference for `GlobalLRU` in tests."""

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
