"""Memory for resident records on the compute device."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType

import torch

from edgemoe.cache.host_buffer import private_map, reserved_map
from edgemoe.cache.record import ALIGNMENT, ExpertId, RecordLayout, round_up
from edgemoe.cache.slot_classes import SlotClass


class SlotRegion:
    """The slots of one size. Slots are numbered from 0 here, and from `first` among all slots of the pool."""

    def __init__(self, memory: torch.Tensor, first: int, count: int | None = None) -> None:
        """`memory` is uint8 [slots, slot bytes], part of the pool's allocation; `count` slots are used, or all."""
        self.memory = memory
        """The slots, uint8 [slots, slot_nbytes], contiguous; valid until the pool is closed."""
        slots, self.slot_nbytes = memory.shape
        self.count = slots if count is None else count
        """How many of the slots are used."""
        self.first = first
        self.numbers = range(first, first + slots)
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
    freed by `release` and `close`.
    """

    def __init__(
        self, classes: Sequence[SlotClass], device: torch.device, room: Sequence[SlotClass] | None = None
    ) -> None:
        """`room` has the slots of each size that may be used later; only a CPU has room, which takes no memory.

        Where the system does not give the addresses, there is none.
        """
        sizes = [round_up(each.nbytes, ALIGNMENT) for each in classes]
        self.device = device
        self._map: mmap.mmap | None = None
        slots = [each.count for each in classes]
        if device.type == "cpu":
            if room is not None and len(room) == len(classes):
                most = [max(one.count, other.count) for one, other in zip(classes, room, strict=True)]
                with suppress(OSError):
                    self._map, slots = reserved_map(_total(most, sizes)), most
            self._map = self._map or private_map(_total(slots, sizes))
            self.memory = torch.frombuffer(self._map, dtype=torch.uint8)
        else:
            self.memory = torch.empty(_total(slots, sizes), dtype=torch.uint8, device=device)
        """The whole allocation, uint8 [bytes]; valid until `close`."""
        regions, first, at = [], 0, 0
        for each, count, size in zip(classes, slots, sizes, strict=True):
            memory = self.memory[at : at + count * size].view(count, size)
            regions.append(SlotRegion(memory, first, each.count))
            first, at = first + count, at + count * size
        self.regions = tuple(sorted(regions, key=lambda region: region.slot_nbytes))
        """Smallest slots first."""

    def region(self, nbytes: int) -> SlotRegion:
        """The region with the smallest slots that hold a record of `nbytes` bytes. Raises ValueError without one."""
        found = next((region for region in self.regions if region.slot_nbytes >= nbytes), None)
        if found is None:
            raise ValueError(f"no slot holds a record of {nbytes} bytes")
        return found

    @property
    def count(self) -> int:
        """The number of slots that are used."""
        return sum(region.count for region in self.regions)

    @property
    def used_memory(self) -> torch.Tensor:
        """The used slots of the largest size, uint8 [slots, slot bytes]."""
        largest = self.regions[-1]
        return largest.memory[: largest.count]

    def release(self, region: SlotRegion, slot: int) -> None:
        """Gives the memory of a slot back to the system, which has zeros there from now on; on a CPU only.

        Pages that it shares with other slots stay.
        """
        if self._map is None or not hasattr(mmap, "MADV_DONTNEED"):
            return
        at = region.memory[slot - region.first].data_ptr() - self.memory.data_ptr()
        first = round_up(at, mmap.PAGESIZE)
        nbytes = (at + region.slot_nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - first
        if nbytes > 0:
            self._map.madvise(mmap.MADV_DONTNEED, first, nbytes)

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


def _total(slots: Sequence[int], sizes: Sequence[int]) -> int:
    return max(1, sum(count * size for count, size in zip(slots, sizes, strict=True)))


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
