"""Experts that have slots, as the cache remembers them and as it lends them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from edgemoe.cache.link import Transfer
from edgemoe.cache.record import ExpertId
from edgemoe.cache.slots import SlotRegion, SlotTable


class LoadReason(Enum):
    """Why an expert was loaded before any request for it."""

    PREFETCH = "prefetch"
    """It was predicted."""
    FILL = "fill"
    """Its slot was free after start-up."""


@dataclass
class Resident:
    """An expert that has a slot, loaded or in flight."""

    slot: int
    """Its number among all slots of the pool."""
    transfer: Transfer | None
    pins: int = 0
    load_reason: LoadReason | None = None
    """Why it was loaded ahead; None once it was requested."""

    @property
    def moving(self) -> bool:
        """Whether its slot is still being written, or about to be.

        A load that fails is not done until its last piece is: the others still write when its error is known.
        """
        transfer = self.transfer
        if transfer is None or transfer.arrived():
            return False
        return not transfer.done or transfer.error is None


@dataclass(frozen=True)
class Loan:
    """Pinned experts of one layer: slot `slots[i]` of its region holds the record of expert `experts[i]`.

    The records may be read: those of `borrow` until its iterator advances or is closed, those of `lend` until its block
    ends.
    """

    experts: tuple[int, ...]
    slots: tuple[int, ...]


class Residency:
    """Which expert holds which slot, and which slots are free. It decides nothing."""

    def __init__(
        self,
        experts: Sequence[int],
        regions: Sequence[SlotRegion],
        all_regions: Sequence[SlotRegion],
        table: SlotTable | None,
    ) -> None:
        """`regions[layer]` are the slots of a layer, one of `all_regions`. ValueError for a layer without slots."""
        if not all(region.count for region in regions):
            raise ValueError("an expert cache needs at least 1 slot for each size of records")
        self.held: dict[ExpertId, Resident] = {}
        """The experts that have slots, in the order in which they got them."""
        self.numbers: list[set[int]] = [set() for _ in experts]
        """Those of each layer."""
        self.moving: list[set[int]] = [set() for _ in experts]
        """Those of each layer whose transfer the device may not have seen the end of."""
        self.layers_of: dict[SlotRegion, list[int]] = {region: [] for region in all_regions}
        """The layers that share each region."""
        for layer, region in enumerate(regions):
            self.layers_of[region].append(layer)
        self._regions = regions
        self._free = {region: list(reversed(region.numbers[: region.count])) for region in all_regions}
        self._withheld = {region: list(reversed(region.numbers[region.count :])) for region in all_regions}
        """The slots that are not used."""
        self._table = table

    def free_slot(self, layer: int) -> int | None:
        """Takes a free slot for an expert of `layer`; None where there is none."""
        free = self._free[self._regions[layer]]
        return free.pop() if free else None

    def region(self, layer: int) -> SlotRegion:
        """The slots that hold the records of `layer`."""
        return self._regions[layer]

    def withhold(self, region: SlotRegion, slot: int) -> None:
        """`slot`, which was taken, is used no more. Lowers the region's count."""
        self._withheld[region].append(slot)
        region.count -= 1

    def admit(self, region: SlotRegion) -> None:
        """A slot that is not used is free. Raises the region's count; IndexError where all are used."""
        self._free[region].append(self._withheld[region].pop())
        region.count += 1

    def add(self, expert: ExpertId, resident: Resident) -> None:
        """`expert` gets the slot of `resident`, which was free; its record is on the way."""
        self.held[expert] = resident
        self.numbers[expert.layer].add(expert.number)
        self.moving[expert.layer].add(expert.number)

    def arrived(self, expert: ExpertId) -> None:
        """Work that is queued on the device from now on may read the record of `expert`."""
        resident = self.held[expert]
        resident.transfer = None
        self.moving[expert.layer].discard(expert.number)
        if self._table is not None:
            self._table.put(expert, resident.slot - self._regions[expert.layer].first)

    def drop(self, expert: ExpertId) -> None:
        """`expert` loses its slot, which is then free."""
        resident = self.held.pop(expert)
        self.numbers[expert.layer].discard(expert.number)
        self.moving[expert.layer].discard(expert.number)
        self._free[self._regions[expert.layer]].append(resident.slot)
        if self._table is not None and resident.transfer is None:
            self._table.remove(expert)

    def loan(self, experts: Sequence[ExpertId]) -> Loan:
        """What a borrower learns of `experts`, which hold slots and are pinned."""
        return Loan(
            experts=tuple(expert.number for expert in experts),
            slots=tuple(self.held[expert].slot - self._regions[expert.layer].first for expert in experts),
        )

    def check_integrity(self) -> None:
        """Raises AssertionError unless each slot is either free or held by one expert of its layers. For tests."""
        for region, layers in self.layers_of.items():
            slots = [held.slot for expert, held in self.held.items() if expert.layer in layers] + self._free[region]
            assert len(slots) == region.count, f"{len(slots)} slots are used, not {region.count}"
            slots += self._withheld[region]
            assert sorted(slots) == list(region.numbers), f"slots lost or duplicated: {sorted(slots)}"
        assert all(held.pins >= 0 for held in self.held.values()), "an expert was unpinned twice"
