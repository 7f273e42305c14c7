"""The cache of expert slots: residency, pins, demand loads, prefetches and evictions."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

from edgemoe.cache.counters import CacheCounters
from edgemoe.cache.eviction.policy import EvictionPolicy
from edgemoe.cache.link import Link, Priority, Transfer
from edgemoe.cache.record import ExpertId
from edgemoe.cache.resident import LoadReason, Loan, Residency, Resident
from edgemoe.cache.slot_allocator import SlotAllocator
from edgemoe.cache.slots import SlotPool, SlotRegion, SlotTable
from edgemoe.cache.store import ExpertStore

POLL_SECONDS = 0.02
"""How often `ExpertCache.poll` is called while a request waits for the link."""
TRANSIT_SLOTS = 3
"""Slots through which the experts beyond a layer's share stream: one in use, one being loaded, one ready."""
_Call = Callable[[], None]


class ExpertCache:
    """Loads experts into slots, pins them while they are read, and evicts. To be used from one thread.

    The contract:
    - `borrow` pins the experts that it yields until its iterator advances or is closed;
    - pinned experts and experts in flight are never evicted;
    - demand loads overtake all prefetches; a request for a prefetch in flight promotes the prefetch;
    - a prefetch takes free slots first; it evicts no pinned expert, no expert that its caller needs sooner, and no
      unused prefetch;
    - a fill takes free slots only; a filled expert is evicted like any other.
    """

    def __init__(
        self, store: ExpertStore, link: Link, pool: SlotPool, policy: EvictionPolicy, table: SlotTable | None = None
    ) -> None:
        """`table` is told where experts may be read, and where no longer."""
        self.store = store
        self.pool = pool
        self.table = table
        self.counters = CacheCounters()
        self._link = link
        self._policy = policy
        self._prefetches: list[Transfer] = []
        self._regions = [pool.region(layout.nbytes) for layout in store.layouts]
        self._residency = Residency(store.experts, self._regions, pool.regions, table)
        self._held = self._residency.held
        self.layers_of = self._residency.layers_of
        """The layers that share each region of the pool."""
        self._device_waited = 0.0
        """The link's `device_wait_seconds` that are counted."""
        self._max_kept = self._shares()
        self._slots: dict[int, tuple[np.ndarray, list[Resident]]] = {}
        """What `slots_of` gives, and the experts there, by layer."""
        self._allocator = SlotAllocator(store, link, policy, self._residency, self.counters, self._slots.clear)
        self.poll: Callable[[], None] = lambda: None
        """Called while a request waits for the link; what it raises ends the request, and nothing stays pinned."""
        self.recording: list[list[ExpertId]] | None = None
        """A trace: unless it is None, `borrow` appends each request to it."""

    def borrow(
        self, layer: int, experts: Sequence[int], meanwhile: _Call | None = None, elsewhere: Collection[int] = ()
    ) -> Generator[Loan, None, None]:
        """Requests `experts` of `layer`, which are distinct, and yields loans that cover each once.

        Hits come first, then misses as they arrive. Misses are put on the link in the given order before the hits are
        yielded; `meanwhile` is called in between. Where there are more misses than slots, slots are reused as loans
        end. The last of `experts` count as used last, in whatever order they arrive, and are evicted last. Raises the
        store's OSError when a record cannot be read. Exhaust or close the iterator before the next call. Those
        `elsewhere`, which have no slot, are requested like the others, and neither loaded nor lent.
        """
        requested = self._request(layer, experts, elsewhere)
        held = [self._held.get(expert) for expert in requested]
        if requested and all(each is not None and each.transfer is None for each in held):
            yield from self._borrow_hits(requested, [each for each in held if each is not None], meanwhile)
            return
        # Checked once per expert: a prefetch that arrives in between must be either a hit or a miss.
        resident = {expert: self.is_resident(expert) for expert in requested}
        hits = [expert for expert in requested if resident[expert]]
        misses = deque(expert for expert in requested if not resident[expert])
        self.counters.misses += len(misses)
        self.counters.hit([self._held[expert] for expert in hits], self.store.layouts[layer].nbytes)
        in_flight, pinned = list[Transfer](), list[ExpertId]()
        self._allocator.spared = set(requested[max(0, len(requested) - self._max_kept[layer]) :])
        try:
            for expert in hits:
                self._pin(expert, pinned)
                self._policy.used(expert)
            self._make_readable(hits)
            self._promote(misses, in_flight, pinned)
            self._demand(misses, in_flight, pinned)
            if meanwhile is not None:
                meanwhile()
            if hits:
                yield self._residency.loan(hits)
                self._unpin(hits, pinned)
            while in_flight or misses:
                # `meanwhile`, or the borrower of a loan, may have prefetched some that had found no slot.
                self._promote(misses, in_flight, pinned)
                self._demand(misses, in_flight, pinned)
                arrived = self._wait(in_flight)
                yield self._residency.loan(arrived)
                self._unpin(arrived, pinned)
        finally:
            self._unpin(list(pinned), pinned)
            self._allocator.spared = ()
            for expert in requested:
                if expert in self._held:
                    self._policy.used(expert)

    def _request(self, layer: int, experts: Sequence[int], elsewhere: Collection[int]) -> list[ExpertId]:
        """Tells trace, policy and counters of a request for `experts`; gives those that are not `elsewhere`."""
        requested = [ExpertId(layer, index) for index in experts]
        if self.recording is not None:
            self.recording.append(requested)
        self._policy.requested(layer, experts)
        self.counters.missed_elsewhere(len(elsewhere))
        return [expert for expert in requested if expert.number not in elsewhere]

    def _borrow_hits(
        self, requested: list[ExpertId], held: list[Resident], meanwhile: _Call | None
    ) -> Generator[Loan, None, None]:
        """As `borrow` where all of `requested`, of which there are some, are resident: a short way for a usual case."""
        self.counters.hit(held, self.store.layouts[requested[0].layer].nbytes)
        for each in held:
            each.pins += 1
        try:
            if meanwhile is not None:
                meanwhile()
            yield self._residency.loan(requested)
        finally:
            for each in held:
                each.pins -= 1
            self._release([each.slot for each in held])
            for expert in requested:
                self._policy.used(expert)

    def slots_of(self, layer: int) -> np.ndarray | None:
        """The slot in its region of each expert of `layer`, int64 [experts]; None unless all of the store are resident.

        The records may be read without a loan: where all experts are resident, none is evicted.
        """
        if not self.complete:
            return None
        if layer not in self._slots:
            experts = [ExpertId(layer, number) for number in range(self.store.experts[layer])]
            if not all(map(self.is_resident, experts)):
                return None
            self._make_readable(experts)
            slots = np.array(self._residency.loan(experts).slots, np.int64)
            self._slots[layer] = slots, [self._held[expert] for expert in experts]
        return self._slots[layer][0]

    def hit(self, layer: int, experts: Sequence[int]) -> None:
        """Counts a request for `experts` of `layer` that were read by `slots_of`. The policy learns of it."""
        if self.recording is not None:
            self.recording.append([ExpertId(layer, number) for number in experts])
        self._policy.requested(layer, experts)
        self.counters.hit([self._slots[layer][1][each] for each in experts], self.store.layouts[layer].nbytes)

    @contextmanager
    def lend(self, layer: int, experts: Sequence[int]) -> Iterator[Loan]:
        """A loan of resident `experts` of `layer` for the duration of the block. Raises KeyError when one is missing.

        For drafts: it loads nothing, and changes neither the counters nor the policy.
        """
        requested, pinned = [ExpertId(layer, index) for index in experts], list[ExpertId]()
        try:
            for expert in requested:
                if not self.is_resident(expert):
                    raise KeyError(expert)
                self._pin(expert, pinned)
            self._make_readable(requested)
            yield self._residency.loan(requested)
        finally:
            self._unpin(list(pinned), pinned)

    def touch(self, layer: int, experts: Sequence[int]) -> None:
        """Tells the policy that a pass, which `lend` served, would have requested `experts` of `layer`, all distinct.

        Nothing is loaded, and no hit or miss is counted. Prefetches among the resident ones count as used.
        """
        self._policy.requested(layer, experts)
        for expert in (ExpertId(layer, number) for number in experts):
            if self.is_resident(expert):
                found = self.counters.resolve(self._held[expert], self.store.record_nbytes(expert))
                self.counters.bytes_prefetched_used += found

    def prefetch(self, experts: Sequence[ExpertId], needed_sooner: Collection[ExpertId] = ()) -> int:
        """Puts `experts` on the link in this order, behind all demand loads. Returns how many loads were started.

        Skips experts that have slots. Stops at the first expert without a slot; see the contract for those it may take.
        """
        started = 0
        keep = set(needed_sooner) | set(experts)
        for expert in experts:
            if expert in self._held:
                continue
            slot = self._allocator.take(expert.layer, keep)
            if slot is None:
                break
            self._load(expert, slot, LoadReason.PREFETCH)
            started += 1
        return started

    def fill(self, experts: Sequence[ExpertId]) -> None:
        """Puts `experts` on the link in this order, behind all demand loads. Skips those without a free slot."""
        for expert in experts:
            slot = None if expert in self._held else self._residency.free_slot(expert.layer)
            if slot is not None:
                self._load(expert, slot, LoadReason.FILL)

    def cancel_prefetches(self, experts: Collection[ExpertId]) -> list[ExpertId]:
        """Cancels the prefetches and fills of `experts` that have not started to move, and frees their slots.

        Returns the experts whose loads were cancelled.
        """
        cancelled = []
        for expert in experts:
            held = self._held.get(expert)
            transfer = held.transfer if held is not None and held.load_reason else None
            if transfer is not None and not transfer.done and self._link.cancel(transfer):
                self._allocator.drop(expert)
                cancelled.append(expert)
        return cancelled

    @property
    def prefetching(self) -> int:
        """The number of prefetches and fills in flight without a request."""
        self._prefetches = [each for each in self._prefetches if self._is_prefetching(each)]
        return len(self._prefetches)

    def resize(self, counts: Mapping[SlotRegion, int]) -> None:
        """Has so many slots of each region used, at least 1 and at most those that its memory has; between requests.

        Experts that lose their slots do so in the policy's order. On a CPU the memory of unused slots is the system's
        again; used ones take memory when they are filled. Where `poll` raises meanwhile, it is left with the slots that
        are used then.
        """
        try:
            for region, count in counts.items():
                for slot in self._allocator.limit(region, count, self._wait_for_prefetch):
                    self.pool.release(region, slot)
        finally:
            self._max_kept = self._shares()

    def _shares(self) -> list[int]:
        """For each layer, how many experts of a request its share of the slots keeps; others stream through."""
        return [max(0, each.count // len(self.layers_of[each]) - TRANSIT_SLOTS) for each in self._regions]

    @property
    def complete(self) -> bool:
        """Whether every expert of the store has a slot."""
        return len(self._held) == sum(self.store.experts)

    def region(self, layer: int) -> SlotRegion:
        """The slots that hold the records of `layer`, in which the loans of `layer` number them."""
        return self._regions[layer]

    def holds(self, expert: ExpertId) -> bool:
        """Whether the expert has a slot, loaded or in flight."""
        return expert in self._held

    def is_resident(self, expert: ExpertId) -> bool:
        """Whether a slot holds the complete record of the expert."""
        held = self._held.get(expert)
        return held is not None and (held.transfer is None or held.transfer.arrived())

    def residents(self, layer: int) -> list[int]:
        """The resident experts of a layer, in no particular order."""
        return [number for number in self._residency.numbers[layer] if self.is_resident(ExpertId(layer, number))]

    def make_readable(self, layer: int) -> None:
        """Lets the caller's device stream read whatever of `layer` has arrived. The slot table learns of it."""
        moving = [ExpertId(layer, number) for number in self._residency.moving[layer]]
        self._make_readable([expert for expert in moving if self.is_resident(expert)])

    def released_all(self) -> None:
        """Work that is queued on the caller's device stream may read any slot: what comes into one waits for it."""
        self._link.released_all()

    def check_integrity(self) -> None:
        """Raises AssertionError unless each slot is either free or held by one expert of its layers. For tests."""
        self._residency.check_integrity()

    def _promote(self, misses: deque[ExpertId], in_flight: list[Transfer], pinned: list[ExpertId]) -> None:
        """Moves prefetches in flight from `misses` to `in_flight`, and pins them before any slot is taken."""
        for expert in list(misses):
            held = self._held.get(expert)
            if held is None or held.transfer is None or (held.transfer.done and held.transfer.error is not None):
                continue
            self._link.promote(held.transfer)
            self._policy.used(expert)
            self.counters.bytes_prefetched_late += self.counters.resolve(held, self.store.record_nbytes(expert))
            misses.remove(expert)
            self._pin(expert, pinned)
            in_flight.append(held.transfer)

    def _demand(self, misses: deque[ExpertId], in_flight: list[Transfer], pinned: list[ExpertId]) -> None:
        """Starts demand loads of `misses` while there are slots, moves them to `in_flight`, and pins them."""
        while misses:
            expert = misses[0]
            if expert in self._held:
                # An earlier load of it failed.
                self._allocator.drop(expert)
            slot = self._allocator.take(expert.layer)
            if slot is None and not (in_flight or pinned):
                slot = self._wait_for_prefetch(expert.layer)
            if slot is None:
                return
            in_flight.append(self._load(expert, slot))
            self.counters.bytes_demanded += self.store.record_nbytes(expert)
            misses.popleft()
            self._pin(expert, pinned)

    def _make_readable(self, experts: Sequence[ExpertId]) -> None:
        """Lets the caller's device stream read resident `experts` that were prefetched or filled."""
        arrived = [held.transfer for held in map(self._held.__getitem__, experts) if held.transfer is not None]
        if arrived:
            self._link.wait_any(arrived)
            for transfer in arrived:
                self._residency.arrived(transfer.expert)

    def _wait(self, in_flight: list[Transfer]) -> list[ExpertId]:
        """Waits for a transfer and removes those that are done from the list. Raises the error of a failed one."""
        arrived = self._wait_any(in_flight)
        in_flight[:] = [transfer for transfer in in_flight if transfer not in arrived]
        for transfer in arrived:
            if transfer.error is not None:
                raise transfer.error
            self._residency.arrived(transfer.expert)
        return [transfer.expert for transfer in arrived]

    def _wait_any(self, transfers: Sequence[Transfer]) -> list[Transfer]:
        started = time.perf_counter()
        while not (arrived := self._link.wait_any(transfers, POLL_SECONDS)):
            self.poll()
        self.counters.link_wait_seconds += time.perf_counter() - started
        return arrived

    def _load(self, expert: ExpertId, slot: int, reason: LoadReason | None = None) -> Transfer:
        """Starts a load into a free slot: a demand load, unless there is a `reason` for loading ahead."""
        priority = Priority.DEMAND if reason is None else Priority.PREFETCH
        region = self._regions[expert.layer]
        transfer = self._link.start(expert, slot, region.memory[slot - region.first], priority)
        self._residency.add(expert, Resident(slot, transfer, load_reason=reason))
        self._policy.inserted(expert)
        if reason is not None:
            self._prefetches.append(transfer)
        return transfer

    def _wait_for_prefetch(self, layer: int) -> int | None:
        """Waits until a load in flight ends, and takes its slot. For a layer whose slots are all being loaded."""
        region = self._regions[layer]
        held = [each for expert, each in self._held.items() if self._regions[expert.layer] is region]
        moving = [each.transfer for each in held if each.transfer is not None]
        assert moving, "no slot is free although nothing is pinned"
        for transfer in self._wait_any(moving):
            if transfer.error is None:
                self._residency.arrived(transfer.expert)
                # What comes into the slot next waits for the device to see this record's end.
                self._link.released([transfer.slot])
        return self._allocator.take(layer)

    def _is_prefetching(self, transfer: Transfer) -> bool:
        held = self._held.get(transfer.expert)
        unasked = not transfer.done and transfer.priority is Priority.PREFETCH
        return unasked and held is not None and held.transfer is transfer

    def _pin(self, expert: ExpertId, pinned: list[ExpertId]) -> None:
        self._held[expert].pins += 1
        pinned.append(expert)

    def _unpin(self, experts: Sequence[ExpertId], pinned: list[ExpertId]) -> None:
        for expert in experts:
            pinned.remove(expert)
            self._held[expert].pins -= 1
        self._release([self._held[expert].slot for expert in experts])

    def _release(self, slots: Sequence[int]) -> None:
        """Tells the link that `slots` are no longer read."""
        self._link.released(slots)
        # What the device has waited for the link is known once it has.
        waited = self._link.device_wait_seconds
        self.counters.link_wait_seconds += waited - self._device_waited
        self._device_waited = waited
