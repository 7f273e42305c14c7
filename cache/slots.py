"""Memory for resident records on the compute device."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from types import TracebackType

import torch

from edgemoe.cache.host_buffer import private_map
from edgemoe.cache.record import ALIGNMENT, ExpertId, RecordLayout, round_up
from edgemoe.cache.slot_classes import SlotClass


class SlotRegion:
    """The slots of one size. Slots are numbered from 0 here, and from `first` among all slots of the pool."""

    def __init__(self, memory: torch.Tensor, first: int) -> None:
        """`memory` is uint8 [slots, slot bytes], part of the pool's allocation."""
        self.memory = memory
        """The slots, uint8 [count, slot_nbytes], contiguous; valid until the pool is closed."""
        self.count, self.slot_nbytes = memory.shape
        self.first = first
        self.numbers = range(first, first + self.count)
        """The numbers of the slots among all slots of the pool."""
        self._views: dict[int, tuple[RecordLayout, dict[str, torch.Tensor]]] = {}
        """The latest views of each slot: layers have layouts of their own, which are mostly equal."""

    def views(self, slot: int, layout: RecordLayout) -> dict[str, torch.Tensor]:
        """The parts of the record in `slot`, as tensors that share its memory. Valid while the record is pinned."""
        found = self._views.get(slot)
        if found is None or (found[0] is not layout and found[0].parts != layout.parts):
            found = self._views[slot] = layout, layout.views(self.memory[slot])
        return found[1]

    def close(self) -> None:
        """Drops all references to the memory."""
        self._views.clear()
        self.memory = torch.empty(0, 0, dtype=torch.uint8)


class SlotPool:
    """Slots in one allocation, with a contiguous region for each of `classes`.

    On a CPU the allocation is an anonymous memory map. Physical memory is committed when a slot is first filled, and
    freed by `close`.
    """

    def __init__(self, classes: Sequence[SlotClass], device: torch.device) -> None:
        sizes = [round_up(each.nbytes, ALIGNMENT) for each in classes]
        total = sum(each.count * size for each, size in zip(classes, sizes, strict=True))
        self.count = sum(each.count for each in classes)
        self.device = device
        self._map: mmap.mmap | None = None
        if device.type == "cpu":
            self._map = private_map(max(1, total))
            self.memory = torch.frombuffer(self._map, dtype=torch.uint8)[:total]
        else:
            self.memory = torch.empty(total, dtype=torch.uint8, device=device)
        """The whole allocation, uint8 [bytes]; valid until `close`."""
        regions, first, at = [], 0, 0
        for each, size in zip(classes, sizes, strict=True):
            nbytes = each.count * size
            regions.append(SlotRegion(self.memory[at : at + nbytes].view(each.count, size), first))
            first, at = first + each.count, at + nbytes
        self.regions = tuple(sorted(regions, key=lambda region: region.slot_nbytes))
        """Smallest slots first."""

    def region(self, nbytes: int) -> SlotRegion:
        """The region with the smallest slots that hold a record of `nbytes` bytes. Raises ValueError without one."""
        found = next((region for region in self.regions if region.slot_nbytes >= nbytes), None)
        if found is None:
            raise ValueError(f"no slot holds a record of {nbytes} bytes")
        return found

    def close(self) -> None:
        """Frees the memory. Idempotent. Tensors of the pool must not be used afterwards."""
        for region in self.regions:
            region.close()
        self.memory = torch.empty(0, dtype=torch.uint8)
        self._map = None

    def __enter__(self) -> SlotPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


Change = tuple[int, int]
"""A place in a flattened table, and the value that is written there."""


class SlotTable:
    """Where the device finds each expert: its slot in the region of its layer, or -1 for one that may not be read.

    Kernels look experts up here, so that they can be queued before the host knows which ones a router has chosen. The
    table is only written on the stream that computes: kernels that are queued before a `flush` see what was there
    before, those after it what is there now.
    """

    def __init__(
        self,
        experts: Sequence[int],
        device: torch.device,
        write: Callable[[torch.Tensor, Sequence[Change]], None],
    ) -> None:
        """`experts[layer]` is the number of a layer's experts.

        `write` queues changes of the flattened table on the caller's device stream, without waiting for it.
        """
        self.device_table = torch.full((len(experts), max(experts, default=0)), -1, dtype=torch.int32, device=device)
        """int32 [layers, experts], on the device; the experts that a layer does not have are absent."""
        self.readable: list[dict[int, int]] = [{} for _ in experts]
        """By layer, the slot of each expert that kernels queued after the next `flush` may read."""
        self._write = write
        self._changes: list[Change] = []

    def put(self, expert: ExpertId, slot: int) -> None:
        """`expert` may be read from `slot` once `flush` was called."""
        self.readable[expert.layer][expert.number] = slot
        self._change(expert, slot)

    def remove(self, expert: ExpertId) -> None:
        """Kernels queued after the next `flush` do not find `expert`."""
        del self.readable[expert.layer][expert.number]
        self._change(expert, -1)

    def flush(self) -> None:
        """Queues all changes since the last call on the caller's device stream. To be called before kernels are."""
        if self._changes:
            self._write(self.device_table, self._changes)
            self._changes = []

    def _change(self, expert: ExpertId, slot: int) -> None:
        self._changes.append((expert.layer * self.device_table.shape[1] + expert.number, slot))
