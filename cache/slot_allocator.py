"""Gives slots to experts that are to be loaded: free ones, and those of experts that it evicts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

from edgemoe.cache.counters import CacheCounters
from edgemoe.cache.eviction.policy import EvictionPolicy
from edgemoe.cache.link import Link
from edgemoe.cache.record import ExpertId
from edgemoe.cache.resident import LoadReason, Residency
from edgemoe.cache.slots import SlotRegion
from edgemoe.cache.store import ExpertStore


class SlotAllocator:
    """Decides with the policy whose slot is taken. Pinned experts and experts in flight keep theirs."""

    def __init__(
        self,
        store: ExpertStore,
        link: Link,
        policy: EvictionPolicy,
        residency: Residency,
        counters: CacheCounters,
        on_drop: Callable[[], None],
    ) -> None:
        """`on_drop` is called whenever an expert loses its slot."""
        self.spared: Collection[ExpertId] = ()
        """Experts that lose their slots after all others."""
        self._store = store
        self._link = link
        self._policy = policy
        self._residency = residency
        self._held = residency.held
        self._counters = counters
        self._on_drop = on_drop

    def take(self, layer: int, keep: Collection[ExpertId] = ()) -> int | None:
        """A free slot for an expert of `layer`, after an eviction if necessary; None when no expert may be evicted.

        `keep` are the experts that a prefetch must not evict; it is empty for a demand load.
        """
        region = self._residency.region(layer)
        free = self._residency.free_slot(layer)
        if free is not None:
            return free

        def evictable(expert: ExpertId) -> bool:
            held = self._held[expert]
            kept = expert in keep or (keep and held.load_reason is LoadReason.PREFETCH)
            return self._residency.region(expert.layer) is region and held.pins == 0 and not held.moving and not kept

        spared = self.spared
        victim = self._policy.victim(layer, lambda expert: expert not in spared and evictable(expert))
        victim = victim or self._policy.victim(layer, evictable)
        if victim is None:
            return None if keep else self._cancel_latest_prefetch(region)
        held = self._held[victim]
        # A failed load moved no bytes.
        if held.transfer is None or held.transfer.error is None:
            self._counters.bytes_prefetched_wasted += self._counters.resolve(held, self._store.record_nbytes(victim))
        self.drop(victim)
        return self._residency.free_slot(layer)

    def drop(self, expert: ExpertId) -> None:
        """`expert` loses its slot, which is then free."""
        self._residency.drop(expert)
        self._on_drop()
        self._policy.removed(expert)

    def limit(self, region: SlotRegion, count: int, wait: Callable[[int], int | None]) -> Iterator[int]:
        """Has `count` slots of `region` used, at least 1 and at most those that its memory has, once it is exhausted.

        Experts lose theirs in the policy's order; nothing may be pinned. `wait` is called with a layer of the region
        where all of its slots are being loaded: it waits for one and takes it. What it raises passes. Yields the slots
        that are used no more, by their numbers among all slots: their memory may be released.
        """
        layer = self._residency.layers_of[region][0]
        while region.count < count:
            self._residency.admit(region)
        while region.count > count:
            slot = self.take(layer)
            if slot is None:
                slot = wait(layer)
            assert slot is not None, "nothing is pinned, and what is in flight ends"
            self._residency.withhold(region, slot)
            yield slot

    def _cancel_latest_prefetch(self, region: SlotRegion) -> int | None:
        """Cancels the latest prefetch into `region` that has not started to move, and takes its slot; or None."""
        for expert, held in reversed(self._held.items()):
            if self._residency.region(expert.layer) is not region or not held.load_reason or held.pins:
                continue
            if held.transfer is not None and self._link.cancel(held.transfer):
                self.drop(expert)
                return self._residency.free_slot(expert.layer)
        return None
