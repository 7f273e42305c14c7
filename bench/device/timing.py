"""Times on the host and on the device, and the device's memory."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable

import psutil
import torch

MIB = 1 << 20
KEPT_MIB = {"reserved": 64, "pinned": 64, "ram": 768}
"""What may stay: the workspaces of torch's matrix products, and on the host the code that was loaded meanwhile."""
WARM_UP = 5
"""Calls before those that are timed."""


def synchronize() -> None:
    """Waits for the card, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def give_back() -> None:
    """Frees what nothing refers to, also what PyTorch keeps of the card's memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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
    """MiB that the driver has free, that torch's allocators hold, and of this process; nothing without a card."""
    if not torch.cuda.is_available():
        return {}
    held = {"free": torch.cuda.mem_get_info()[0] // MIB, "reserved": torch.cuda.memory_reserved() // MIB}
    return held | {"pinned": _pinned_nbytes() // MIB, "ram": psutil.Process().memory_info().rss // MIB}


def kept(before: dict[str, int], after: dict[str, int]) -> list[str]:
    """A sentence for each kind of memory that has grown by more than `KEPT_MIB` since `before`."""
    more = {name: after[name] - before[name] for name in KEPT_MIB if after}
    return [f"{mib} MiB stay after close ({name})" for name, mib in more.items() if mib > KEPT_MIB[name]]


def _pinned_nbytes() -> int:
    """Page-locked bytes that torch's host allocator holds, in use or not."""
    stats = torch.cuda.host_memory_stats() if hasattr(torch.cuda, "host_memory_stats") else {}
    return int(stats.get("allocated_bytes.current", 0))
