"""Small tensors of the device, brought to the host behind the work that computes them, without stopping the device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from edgemoe.cache import accelerator
from edgemoe.cache.host_buffer import HostBuffer

BUFFER_NBYTES = 1 << 16
"""A buffer has a multiple of this many bytes."""


class HostRead(ABC):
    """Values on their way to the host. `wait` is the only thing that blocks, and is called once."""

    @abstractmethod
    def arrived(self) -> bool:
        """Whether `wait` would not block."""

    @abstractmethod
    def wait(self) -> list[torch.Tensor]:
        """The values, each on the CPU with the shape and dtype that it has on the device. They are the caller's."""


class HostReads(ABC):
    """Starts reads of the device. Used by one thread."""

    @abstractmethod
    def start(self, values: Sequence[torch.Tensor]) -> HostRead:
        """Queues copies of `values` on the caller's device stream. They may be overwritten by work queued later."""

    def close(self) -> None:  # noqa: B027
        """Frees the buffers. No read may be under way."""


class DeviceReads(HostReads):
    """Copies into page-locked buffers, of which there are as many as reads under way at a time.

    Has run on no card yet in this form.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: list[HostBuffer] = []
        self._all: list[HostBuffer] = []

    def start(self, values: Sequence[torch.Tensor]) -> HostRead:
        """See the base class."""
        needed = sum(-(-value.nbytes // 8) * 8 for value in values)
        buffer = self._buffer(needed)
        copies, at = [], 0
        for value in values:
            target = buffer.memory[at : at + value.nbytes].view(value.dtype).view(value.shape)
            target.copy_(value, non_blocking=True)
            copies.append(target)
            at += -(-value.nbytes // 8) * 8
        event = accelerator.new_event()
        event.record(accelerator.current_stream(self._device))
        return _DeviceRead(self, buffer, copies, event)

    def close(self) -> None:
        """See the base class."""
        for buffer in self._all:
            buffer.close()
        self._all.clear()
        self._free.clear()

    def give_back(self, buffer: HostBuffer) -> None:
        """`buffer` is read no more."""
        self._free.append(buffer)

    def _buffer(self, nbytes: int) -> HostBuffer:
        for place, buffer in enumerate(self._free):
            if buffer.memory.nbytes >= nbytes:
                return self._free.pop(place)
        made = HostBuffer(-(-max(1, nbytes) // BUFFER_NBYTES) * BUFFER_NBYTES, pin=True)
        self._all.append(made)
        return made


class _DeviceRead(HostRead):
    def __init__(self, reads: DeviceReads, buffer: HostBuffer, copies: list[torch.Tensor], event: Any) -> None:
        self._reads, self._buffer, self._copies, self._event = reads, buffer, copies, event

    def arrived(self) -> bool:
        """See the base class."""
        return bool(self._event.query())

    def wait(self) -> list[torch.Tensor]:
        """See the base class."""
        self._event.synchronize()
        values = [copy.clone() for copy in self._copies]
        self._reads.give_back(self._buffer)
        return values


class DirectReads(HostReads):
    """The plain form: values are read when they are waited for. For a device that computes as it is called."""

    def start(self, values: Sequence[torch.Tensor]) -> HostRead:
        """See the base class."""
        return _DirectRead([value.clone() for value in values])


class _DirectRead(HostRead):
    def __init__(self, values: list[torch.Tensor]) -> None:
        self._values = values

    def arrived(self) -> bool:
        """See the base class."""
        return True

    def wait(self) -> list[torch.Tensor]:
        """See the base class."""
        return [value.cpu() for value in self._values]
