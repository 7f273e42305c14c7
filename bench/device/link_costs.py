"""What copies, launches and round trips between host and card cost. It decides how a layer asks for its experts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from bench.device.section import Found, Target
from bench.device.timing import MIB, device_ms, host_us, synchronize
from edgemoe.cache.host_buffer import HostBuffer

SLAB = 252 * MIB
SLABS = 4
RECORD = 9 * MIB
"""An expert of Qwen3-30B-A3B in bf16."""
SIZES = (256 << 10, MIB, 2654208, RECORD)
"""2,654,208 is the same expert at 4.5 bits."""


def measure(target: Target) -> Found:
    """Page-locking, bandwidth, and the host's time in what a layer does on a card."""
    device = torch.device(target.device)
    figures: dict[str, Any] = {}
    began = time.perf_counter()
    buffers = [HostBuffer(SLAB, pin=True) for _ in range(SLABS)]
    figures["lock_s_per_GiB"] = round((time.perf_counter() - began) / (SLABS * SLAB / (1 << 30)), 3)
    figures["lock_s_per_GiB by torch"] = _torch_lock_s_per_gib()
    copies = Copies([each.memory for each in buffers], torch.empty(8, RECORD, dtype=torch.uint8, device=device))
    figures["to_card_GBps"] = {f"{size >> 10} KiB": copies.bandwidth(size) for size in SIZES}
    figures |= _round_trips(copies, device)
    faults = [] if all(each.locked for each in buffers) else ["the system locks less than a GiB"]
    synchronize()
    for buffer in buffers:
        buffer.close()
    return Found(figures, faults)


def _torch_lock_s_per_gib() -> float:
    began = time.perf_counter()
    torch.empty(SLAB, dtype=torch.uint8, pin_memory=True)
    return round((time.perf_counter() - began) / (SLAB / (1 << 30)), 3)


class Copies:
    """Asynchronous copies from page-locked memory, on a stream of their own."""

    def __init__(self, slabs: list[torch.Tensor], records: torch.Tensor) -> None:
        self._slabs = slabs
        self._records = records
        self._stream = torch.cuda.Stream()

    def queue(self, count: int, size: int) -> None:
        """Queues `count` copies of `size` bytes."""
        with torch.cuda.stream(self._stream):
            for number in range(count):
                at = (number * size) % (SLAB - size)
                source = self._slabs[number % len(self._slabs)][at : at + size]
                self._records[number % len(self._records), :size].copy_(source, non_blocking=True)

    def bandwidth(self, size: int) -> float:
        """GB/s with copies of `size` bytes."""
        count = max(8, min(256, (512 * MIB) // size))
        self.queue(4, size)
        taken = device_ms(lambda: self.queue(count, size), self._stream)
        return round(count * size / taken / 1e6, 1)

    def us_behind(self, call: Callable[[], object]) -> float:
        """Median microseconds of the host's time in `call` while 8 records are on the bus."""
        taken = []
        for _ in range(9):
            self.queue(8, RECORD)
            began = time.perf_counter()
            call()
            taken.append(time.perf_counter() - began)
            synchronize()
        return round(1e6 * statistics.median(taken), 1)


def _round_trips(copies: Copies, device: torch.device) -> dict[str, Any]:
    hidden, ids = torch.randn(8, 2048, device=device), torch.randint(128, (1, 8), device=device)
    landing = torch.empty(1, 8, dtype=torch.int64, pin_memory=True)

    def spin() -> None:
        """The ids into page-locked memory, and the host asking until they are there."""
        landing.copy_(ids, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        while not event.query():
            pass

    def two_events() -> None:
        for _ in range(2):
            torch.cuda.Event(enable_timing=True).record()

    return {
        "launch_us": host_us(lambda: hidden.add_(1), 500),
        "tolist_us": host_us(lambda: ids.tolist()),
        "list_index_us": host_us(lambda: hidden[[3]]),
        "two_events_us": host_us(two_events),
        "ids_by_event_us": host_us(spin),
        "list_index_us_behind_copies": copies.us_behind(lambda: hidden[[3]]),
        "ids_by_event_us_behind_copies": copies.us_behind(spin),
    }
