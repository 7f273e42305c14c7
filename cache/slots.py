"""Memory for resident records on the compute device."""

from __future__ import annotations

import mmap
from types import TracebackType

import torch

from edgemoe.cache.host_buffer import private_map
from edgemoe.cache.record import ALIGNMENT, RecordLayout, round_up


class SlotPool:
    """`count` slots of equal size in one allocation.

    On a CPU the allocation is an anonymous memory map. Physical memory is committed when a slot is first filled, and
    freed by `close`.
    """

    def __init__(self, count: int, slot_nbytes: int, device: torch.device) -> None:
        self.count = count
        self.slot_nbytes = round_up(slot_nbytes, ALIGNMENT)
        self.device = device
        self._map: mmap.mmap | None = None
        if device.type == "cpu":
            self._map = private_map(max(1, count * self.slot_nbytes))
            flat = torch.frombuffer(self._map, dtype=torch.uint8)[: count * self.slot_nbytes]
        else:
            flat = torch.empty(count * self.slot_nbytes, dtype=torch.uint8, device=device)
        self.memory = flat.view(count, self.slot_nbytes)
        """All slots, uint8 [count, slot_nbytes]; valid until `close`."""
        self._views: dict[tuple[int, int], dict[str, torch.Tensor]] = {}

    def views(self, slot: int, layout: RecordLayout) -> dict[str, torch.Tensor]:
        """The parts of the record in `slot`, as tensors that share its memory. Valid while the record is pinned."""
        key = (slot, id(layout))
        found = self._views.get(key)
        if found is None:
            found = self._views[key] = layout.views(self.memory[slot])
        return found

    def close(self) -> None:
        """Frees the memory. Idempotent. Tensors of the pool must not be used afterwards."""
        self._views.clear()
        self.memory = torch.empty(0, 0, dtype=torch.uint8)
        self._map = None

    def __enter__(self) -> SlotPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
