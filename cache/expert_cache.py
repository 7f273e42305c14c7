"""The cache of expert slots: what is resident, what is pinned, what is on its way."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum

from edgemoe.cache.counters import CacheCounters
from edgemoe.cache.link import Link, Priority, Transfer
from edgemoe.cache.policy import EvictionPolicy
from edgemoe.cache.record import ExpertId
from edgemoe.cache.slots import SlotPool
from edgemoe.cache.store import ExpertStore

PASSING_SLOTS = 3
"""Slots of a layer's share through which its less wanted experts pass: one in use, one on the link, one ready."""


class LoadReason(Enum):
    """Why an expert was brought that nothing has asked for yet."""

    PREFETCH = "prefetch"
    """It was foretold."""
    FILL = "fill"
    """Its slot was free at the start."""


@dataclass
class _Resident:
    """An expert that holds a slot, loaded or loading."""

    slot: int
    transfer: Transfer | None
    pins: int = 0
    load_reason: LoadReason | None = None


@dataclass(frozen=True)
class Loan:
    """Experts of one layer that may be read now: `slots[i]` holds the record of expert `experts[i]`.

    Pinned until the iteration that yielded it moves on.
    """

    experts: tuple[int, ...]
    slots: tuple[int, ...]


class ExpertCache:
    """Slots, their contents and their traffic. Used from one thread; only the link has others.

    The contract:
    - `borrow` pins what it yields; the pin ends when its iterator moves on or is closed;
    - nothing pinned and nothing on the link is ever evicted;
    - a demanded load overtakes every prefetch, and one already on the link is promoted, not repeated;
    - a prefetch takes free slots first and evicts only what is neither pinned, nor named by its caller
      as wanted sooner, nor a prefetch that nothing has used yet;
    - what merely fills free slots evicts nothing, and leaves like anything that was used long ago.
    """

    def __init__(self, store: ExpertStore, link: Link, pool: SlotPool, policy: EvictionPolicy) -> None:
        if pool.count < 1:
            raise ValueError("an expert cache needs at least 1 slot")
        self.store = store
        self.pool = pool
        self.counters = CacheCounters()
        self._link = link
        self._policy = policy
        self._held: dict[ExpertId, _Resident] = {}
        self._experts = sum(store.experts)
        self._prefetches: list[Transfer] = []
        self._numbers: list[set[int]] = [set() for _ in store.experts]
        self._free = list(range(pool.count - 1, -1, -1))
        # A layer that needs more experts than its share of the slots passes the others through these few.
        self._stay = max(0, pool.count // len(store.experts) - PASSING_SLOTS)
        self._staying: set[ExpertId] = set()
        self.recording: list[list[ExpertId]] | None = None
        """When it is a list, what every pass asks for is appended to it: a trace."""

    def borrow(
        self, layer: int, experts: Sequence[int], meanwhile: Callable[[], None] | None = None
    ) -> Generator[Loan, None, None]:
        """Yields loans that cover `experts` (distinct) of `layer` once each: hits first, misses as they arrive.

        Misses are put on the link before the hits are yielded, in the given order. When there are fewer
        slots than misses, slots are reused as loans end, so any number of experts passes through any
        number of slots. Those that come last in `experts` count as used last, in whatever order they
        arrive, and keep their slots while others can go. Raises the store's OSError when a record cannot
        be read. Close the iterator (or exhaust it) before the next call.
        """
        wanted = [ExpertId(layer, index) for index in experts]
        if self.recording is not None:
            self.recording.append(wanted)
        self._policy.wanted(layer, experts)
        # Asked once each: what arrives in between must be in one of the two.
        resident = {expert: self.is_resident(expert) for expert in wanted}
        hits = [expert for expert in wanted if resident[expert]]
        misses = deque(expert for expert in wanted if not resident[expert])
        self._count(hits, misses)
        on_the_way: list[Transfer] = []
        pinned: list[ExpertId] = []
        self._staying = set(wanted[-self._stay :]) if self._stay else set()
        try:
            for expert in hits:
                self._pin(expert, pinned)
                self._policy.used(expert)
            self._settle(hits)
            self._promote(misses, on_the_way, pinned)
            self._demand(misses, on_the_way, pinned)
            if meanwhile is not None:
                meanwhile()
            if hits:
                yield self._loan(hits)
                self._unpin(hits, pinned)
            while on_the_way or misses:
                self._demand(misses, on_the_way, pinned)
                arrived = self._arrived(on_the_way)
                yield self._loan(arrived)
                self._unpin(arrived, pinned)
        finally:
            self._unpin(list(pinned), pinned)
            self._staying = set()
            for expert in wanted:
                if expert in self._held:
                    self._policy.used(expert)

    @contextmanager
    def lend(self, layer: int, experts: Sequence[int]) -> Iterator[Loan]:
        """A loan of `experts` of `layer`, all of them resident, for the block; KeyError when one is not.

        For drafts: nothing is loaded, counted or remembered as used.
        """
        wanted = [ExpertId(layer, index) for index in experts]
        pinned: list[ExpertId] = []
        try:
            for expert in wanted:
                if not self.is_resident(expert):
                    raise KeyError(expert)
                self._pin(expert, pinned)
            self._settle(wanted)
            yield self._loan(wanted)
        finally:
            self._unpin(list(pinned), pinned)

    def prefetch(self, experts: Sequence[ExpertId], wanted_sooner: Collection[ExpertId] = ()) -> int:
        """Puts `experts` on the link, in this order, behind every demanded load; returns how many were started.

        Stops at the first one for which no slot may be taken (see the contract).
        """
        started = 0
        keep = set(wanted_sooner) | set(experts)
        for expert in experts:
            if expert in self._held:
                continue
            slot = self._take_slot(expert.layer, keep)
            if slot is None:
                break
            self._bring(expert, slot, LoadReason.PREFETCH)
            started += 1
        return started

    def fill(self, experts: Sequence[ExpertId]) -> None:
        """Puts `experts` on the link, in this order and as `prefetch` does, as long as slots are free."""
        for expert in experts:
            if not self._free:
                break
            if expert not in self._held:
                self._bring(expert, self._free.pop(), LoadReason.FILL)

    def call_off(self, experts: Collection[ExpertId]) -> list[ExpertId]:
        """Takes those prefetches of `experts` of which nothing has moved yet off the link and frees their slots."""
        called_off = []
        for expert in experts:
            held = self._held.get(expert)
            transfer = held.transfer if held is not None and held.load_reason else None
            if transfer is not None and not transfer.done and self._link.cancel(transfer):
                self._drop(expert)
                called_off.append(expert)
        return called_off

    @property
    def prefetching(self) -> int:
        """Prefetches, and what fills slots, that are on the way and that nothing has asked for yet."""
        self._prefetches = [
            transfer
            for transfer in self._prefetches
            if not transfer.done and transfer.priority is Priority.PREFETCH and self._holds(transfer)
        ]
        return len(self._prefetches)

    @property
    def complete(self) -> bool:
        """Whether every expert there is has a slot."""
        return len(self._held) == self._experts

    def holds(self, expert: ExpertId) -> bool:
        """Whether the expert has a slot, loaded or loading."""
        return expert in self._held

    def is_resident(self, expert: ExpertId) -> bool:
        """Whether the record is in a slot now, whole."""
        held = self._held.get(expert)
        return held is not None and (held.transfer is None or held.transfer.arrived())

    def residents(self, layer: int) -> list[int]:
        """The resident experts of a layer, in no order."""
        held = self._numbers[layer]
        return [number for number in held if self.is_resident(ExpertId(layer, number))]

    def check_integrity(self) -> None:
        """Raises AssertionError unless free and held slots add up and no slot is held twice. For tests."""
        slots = [held.slot for held in self._held.values()] + self._free
        assert sorted(slots) == list(range(self.pool.count)), f"slots lost or doubled: {sorted(slots)}"
        assert all(held.pins >= 0 for held in self._held.values()), "an expert was unpinned twice"

    def _count(self, hits: Collection[ExpertId], misses: Collection[ExpertId]) -> None:
        counters = self.counters
        counters.hits += len(hits)
        counters.misses += len(misses)
        for expert in hits:
            held, nbytes = self._held[expert], self.store.record_nbytes(expert)
            counters.bytes_hit += nbytes
            counters.bytes_prefetched_used += self._settled(held, nbytes)

    def _promote(self, misses: deque[ExpertId], on_the_way: list[Transfer], pinned: list[ExpertId]) -> None:
        """Takes what is on the link already off `misses`, and pins it before any slot is taken."""
        for expert in list(misses):
            held = self._held.get(expert)
            if held is None or held.transfer is None or (held.transfer.done and held.transfer.error is not None):
                continue
            self._link.promote(held.transfer)
            self._policy.used(expert)
            self.counters.bytes_prefetched_late += self._settled(held, self.store.record_nbytes(expert))
            misses.remove(expert)
            self._pin(expert, pinned)
            on_the_way.append(held.transfer)

    def _demand(self, misses: deque[ExpertId], on_the_way: list[Transfer], pinned: list[ExpertId]) -> None:
        """Starts as many of `misses` as there are slots for, and pins them."""
        while misses:
            expert = misses[0]
            if expert in self._held:
                # Its load failed before and is tried again.
                self._drop(expert)
            slot = self._take_slot(expert.layer, ())
            if slot is None and not (on_the_way or pinned):
                slot = self._outlast_prefetches(expert.layer)
            if slot is None:
                return
            held = self._load(expert, slot, Priority.DEMAND)
            self.counters.bytes_demanded += self.store.record_nbytes(expert)
            assert held.transfer is not None
            misses.popleft()
            self._pin(expert, pinned)
            on_the_way.append(held.transfer)

    def _settle(self, hits: Sequence[ExpertId]) -> None:
        """Makes prefetches that arrived unasked readable by the caller's device stream."""
        arrived = [held.transfer for held in map(self._held.__getitem__, hits) if held.transfer is not None]
        if arrived:
            self._link.wait_any(arrived)
            for transfer in arrived:
                self._held[transfer.expert].transfer = None

    def _arrived(self, on_the_way: list[Transfer]) -> list[ExpertId]:
        """Waits for at least one transfer, takes all that are done off the list, raises what failed."""
        started = time.perf_counter()
        arrived = self._link.wait_any(on_the_way)
        self.counters.link_wait_seconds += time.perf_counter() - started
        on_the_way[:] = [transfer for transfer in on_the_way if transfer not in arrived]
        for transfer in arrived:
            if transfer.error is not None:
                raise transfer.error
            self._held[transfer.expert].transfer = None
        return [transfer.expert for transfer in arrived]

    def _load(self, expert: ExpertId, slot: int, priority: Priority) -> _Resident:
        transfer = self._link.start(expert, slot, self.pool.memory[slot], priority)
        held = self._held[expert] = _Resident(slot, transfer)
        self._numbers[expert.layer].add(expert.number)
        self._policy.inserted(expert)
        return held

    def _bring(self, expert: ExpertId, slot: int, why: LoadReason) -> None:
        held = self._load(expert, slot, Priority.PREFETCH)
        held.load_reason = why
        assert held.transfer is not None
        self._prefetches.append(held.transfer)

    def _take_slot(self, layer: int, keep: Collection[ExpertId]) -> int | None:
        if self._free:
            return self._free.pop()

        def evictable(expert: ExpertId) -> bool:
            held = self._held[expert]
            moving = held.transfer is not None and not held.transfer.done
            foretold = held.load_reason is LoadReason.PREFETCH
            return held.pins == 0 and not moving and expert not in keep and not (keep and foretold)

        staying = self._staying
        victim = self._policy.victim(layer, lambda expert: expert not in staying and evictable(expert))
        victim = victim or self._policy.victim(layer, evictable)
        if victim is None:
            return None if keep else self._call_off_a_prefetch()
        held = self._held[victim]
        # What could not be read has not moved.
        if held.transfer is None or held.transfer.error is None:
            self.counters.bytes_prefetched_wasted += self._settled(held, self.store.record_nbytes(victim))
        self._drop(victim)
        return self._free.pop()

    def _settled(self, held: _Resident, nbytes: int) -> int:
        """Notes that the fate of `held` is known; its `nbytes` if it was a prefetch, after counting them if a fill."""
        why, held.load_reason = held.load_reason, None
        if why is LoadReason.FILL:
            self.counters.bytes_filled += nbytes
        return nbytes if why is LoadReason.PREFETCH else 0

    def _call_off_a_prefetch(self) -> int | None:
        """The slot of a prefetch of which nothing has moved yet, the latest one: a demand goes before it."""
        for expert, held in reversed(self._held.items()):
            if held.load_reason and held.transfer is not None and held.pins == 0 and self._link.cancel(held.transfer):
                self._drop(expert)
                return self._free.pop()
        return None

    def _outlast_prefetches(self, layer: int) -> int | None:
        """A slot when every one is held by a load on its way that nobody waits for: that of the first to arrive."""
        moving = [held.transfer for held in self._held.values() if held.transfer is not None]
        assert moving, "no slot is free although nothing is pinned"
        started = time.perf_counter()
        self._link.wait_any(moving)
        self.counters.link_wait_seconds += time.perf_counter() - started
        return self._take_slot(layer, ())

    def _holds(self, transfer: Transfer) -> bool:
        held = self._held.get(transfer.expert)
        return held is not None and held.transfer is transfer

    def _drop(self, expert: ExpertId) -> None:
        self._free.append(self._held.pop(expert).slot)
        self._numbers[expert.layer].discard(expert.number)
        self._policy.removed(expert)

    def _pin(self, expert: ExpertId, pinned: list[ExpertId]) -> None:
        self._held[expert].pins += 1
        pinned.append(expert)

    def _unpin(self, experts: Sequence[ExpertId], pinned: list[ExpertId]) -> None:
        for expert in experts:
            pinned.remove(expert)
            self._held[expert].pins -= 1
        self._link.released([self._held[expert].slot for expert in experts])

    def _loan(self, experts: Sequence[ExpertId]) -> Loan:
        return Loan(
            experts=tuple(expert.number for expert in experts),
            slots=tuple(self._held[expert].slot for expert in experts),
        )
