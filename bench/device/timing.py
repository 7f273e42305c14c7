"""Times on the host and on the device, and the device's memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

MIB = 1 << 20
KEPT_MIB = 64
"""What may stay with torch: the workspaces of its matrix products."""
WARM_UP = 5
"""Calls before those that are timed."""


def synchronize() -> None:
    """Waits for the card, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def host_us(call: Callable[[], object], times: int = 50) -> float:
    """Median microseconds of the host's time in `call`."""
    for _ in range(WARM_UP):
        call()
    synchronize()
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    synchronize()
    return round(1e6 * statistics.median(taken), 1)


def device_ms(work: Callable[[], object], stream: torch.cuda.Stream | None = None) -> float:
    """Milliseconds of the device's time in what `work` queues on `stream`, or on the current one."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.stream(stream):
        start.record()
        work()
        end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def device_memory() -> dict[str, int]:
    """MiB that the driver has free and that torch's allocators hold; nothing without a card."""
    if not torch.cuda.is_available():
        return {}
    held = {"free": torch.cuda.mem_get_info()[0] // MIB, "reserved": torch.cuda.memory_reserved() // MIB}
    return held | {"pinned": _pinned_nbytes() // MIB}


def kept(before: dict[str, int], after: dict[str, int]) -> list[str]:
    """A sentence for each of torch's allocators that holds more than `KEPT_MIB` more than `before`."""
    more = {name: after[name] - before[name] for name in ("reserved", "pinned") if after}
    return [f"{mib} MiB stay {name} after close" for name, mib in more.items() if mib > KEPT_MIB]


def _pinned_nbytes() -> int:
    """Page-locked bytes that torch's host allocator holds, in use or not."""
    stats = torch.cuda.host_memory_stats() if hasattr(torch.cuda, "host_memory_stats") else {}
    return int(stats.get("allocated_bytes.current", 0))
