"""The engine's own layers, cache, slot table and link on a stand-in device."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn

from bench.no_card.stand_in.kernels import StandInKernels
from bench.no_card.stand_in.lanes import Device, StandInReads, StandInStreams, TurnLink, Turns
from edgemoe.cache import ExpertCache, ExpertId, SlotClass, SlotPool
from edgemoe.cache.eviction.policy import Evictable, EvictionPolicy
from edgemoe.cache.slots import SlotTable
from edgemoe.cache.store import Piece
from edgemoe.experts.expert_layer import ExpertLayers
from edgemoe.experts.grouped_layer import DeviceTools, GroupedLayer
from edgemoe.experts.router_hook import CurrentLayer
from edgemoe.formats.float_format import FloatFormat
from edgemoe.kernels.triton.activations import GateRule
from edgemoe.kernels.triton.grouped_ffn import GroupedFfn, GroupedMatrix, patch
from edgemoe.kernels.triton.launcher import Launcher
from tests.support.cache_fakes import FakeStore, LockedStore

EXPERTS = ((4, 6), (6, 4), (5, 5), (2, 3))
"""Experts of the layers. All of the last ones fit the most slots."""
SLOTS = (3, 4, 5)
MAX_TOKENS, WIDTH, RECORD = 3, 4, 64
"""Tokens of a pass, values of a hidden state, bytes of a record."""


class Records(LockedStore):
    """Records some of which are pageable, and of these some cannot be read."""

    def __init__(self, experts: Sequence[int]) -> None:
        super().__init__(FakeStore(experts, RECORD))
        self.unreadable: set[ExpertId] = set()

    def pieces(self, expert: ExpertId, slot: torch.Tensor) -> Sequence[Piece]:
        """See the base class."""
        if expert in self.unreadable:
            raise OSError(f"expert {expert.number} of layer {expert.layer} cannot be read")
        return super().pieces(expert, slot)


class RandomVictim(EvictionPolicy):
    """Evicts any expert that may be evicted: no order of use is relied on."""

    def __init__(self, draw: random.Random) -> None:
        self._held: list[ExpertId] = []
        self._draw = draw

    def inserted(self, expert: ExpertId) -> None:
        """See the base class."""
        self._held.append(expert)

    def used(self, expert: ExpertId) -> None:
        """See the base class."""

    def removed(self, expert: ExpertId) -> None:
        """See the base class."""
        self._held.remove(expert)

    def victim(self, layer: int, evictable: Evictable) -> ExpertId | None:
        """See the base class."""
        may = [expert for expert in self._held if evictable(expert)]
        return self._draw.choice(may) if may else None


class Workshop:
    """What engines share, one after the other, because it takes longer to make than a schedule to run."""

    def __init__(self) -> None:
        self.launcher = Launcher()
        self.stores = {experts: Records(experts) for experts in EXPERTS}
        self.pools = {slots: SlotPool([SlotClass(RECORD, slots)], torch.device("cpu")) for slots in SLOTS}
        self.ffns = {slots: self._ffn(pool) for slots, pool in self.pools.items()}
        self.hidden = torch.zeros(MAX_TOKENS, WIDTH)

    def close(self) -> None:
        """Frees the memory."""
        for store in self.stores.values():
            store.close()
        for pool in self.pools.values():
            pool.close()

    def _ffn(self, pool: SlotPool) -> GroupedFfn:
        kind, cpu = FloatFormat(torch.float32), torch.device("cpu")
        up = GroupedMatrix(kind, (2 * WIDTH, WIDTH), {"": 0}, cpu)
        down = GroupedMatrix(kind, (WIDTH, WIDTH), {"": 0}, cpu)
        gate = GateRule("silu", gated=True)
        return GroupedFfn(self.launcher, pool.regions[0].memory, up, down, gate, torch.float32)


class StandInEngine:
    """Two MoE layers, whose experts, slots and records are drawn."""

    def __init__(self, workshop: Workshop, draw: random.Random, predictor: Any) -> None:
        """`predictor` has the methods of an `ExpertPredictor` that a grouped layer calls. Some layers do without."""
        self.experts = draw.choice(EXPERTS)
        self.every = [ExpertId(layer, number) for layer, count in enumerate(self.experts) for number in range(count)]
        slots = draw.choice(SLOTS)
        pool = workshop.pools[slots]
        pool.memory.zero_()
        store = workshop.stores[self.experts]
        store.pageable = set(draw.sample(self.every, draw.choice((0, 0, 2, len(self.every)))))
        store.unreadable = set(draw.sample(self.every, draw.choice((0, 0, 1))))
        self.device = Device(draw)
        self.turns = Turns(self.device, draw)
        self.kernels = StandInKernels(self.device, pool.regions[0])
        self.streams = StandInStreams(self.device, self.turns)
        self.link = TurnLink(store, self.streams, draw.choice((1, 2)), self.turns)
        self.table = SlotTable(self.experts, pool.device, partial(patch, workshop.launcher))
        self.cache = ExpertCache(store, self.link, pool, RandomVictim(draw), self.table)
        self.reads = StandInReads(self.device, self.turns)
        tools = DeviceTools(workshop.launcher, self.table, self.reads)
        self.layers = ExpertLayers(CurrentLayer(nn.Module(), []), self.cache)
        for number, count in enumerate(self.experts):
            module = cast(Any, SimpleNamespace(experts=count))
            plain = cast(Any, SimpleNamespace(module=None))
            own = predictor if draw.random() < 0.7 else None
            ffn = workshop.ffns[slots]
            self.layers.layers.append(GroupedLayer(number, module, plain, self.cache, own, ffn, tools))

    def finish(self) -> None:
        """Ends the link and lets the device do what is queued. Raises Deadlock where that does not come to an end."""
        self.table.flush()
        self.link.close()
        self.device.finish()
