"""This machine: memory within control-group limits, cores, GPUs, and measured speeds."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

CGROUP_ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Gpu:
    """A CUDA device as the driver reports it; sizes in bytes."""

    index: int
    name: str
    total: int
    free: int


@dataclass(frozen=True)
class GroupLimit:
    """A control group's memory: its hard limit and what of it is in use and cannot be reclaimed, in bytes."""

    limit: int
    used: int


def ram_free() -> int:
    """Bytes of RAM that this process can still take: what the system has, within every control group's limit."""
    free = psutil.virtual_memory().available
    return max(0, min([free, *(group.limit - group.used for group in group_limits())]))


def ram_limit() -> int:
    """Bytes of RAM that this process could have at most, control groups respected."""
    return min([psutil.virtual_memory().total, *(group.limit for group in group_limits())])


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def group_limits(root: Path = CGROUP_ROOT, membership: Path = Path("/proc/self/cgroup")) -> list[GroupLimit]:
    """The memory limits of this process's control group and its ancestors, hierarchy v1 or v2.

    Page cache counts as usage for the kernel but not here, since it is given up when memory is wanted.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return []
    found: list[GroupLimit] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", "total_active_file")
            found += _walk(root / "memory", path, *names)
        elif controllers == "":
            found += _walk(root, path, "memory.max", "memory.current", "inactive_file", "active_file")
    return found


def gpus() -> list[Gpu]:
    """The CUDA devices that the driver reports; none without a driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        return [_gpu(index) for index in range(pynvml.nvmlDeviceGetCount())]
    finally:
        pynvml.nvmlShutdown()


def _gpu(index: int) -> Gpu:
    import pynvml

    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return Gpu(index, str(pynvml.nvmlDeviceGetName(handle)), int(memory.total), int(memory.free))


def _walk(base: Path, path: str, limit: str, usage: str, *cached: str) -> Iterator[GroupLimit]:
    """The limits of the group at `path` and of its ancestors. Inside a container the path may lie outside `base`."""
    folder = base / path.lstrip("/")
    if not folder.exists():
        folder = base
    while True:
        allowed, used = _number(folder / limit), _number(folder / usage)
        if allowed is not None and used is not None and allowed < psutil.virtual_memory().total:
            reclaimable = _stat(folder / "memory.stat")
            yield GroupLimit(allowed, max(0, used - sum(reclaimable.get(name, 0) for name in cached)))
        if folder == base:
            return
        folder = folder.parent


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _stat(file: Path) -> dict[str, int]:
    try:
        pairs = (line.split() for line in file.read_text().splitlines())
        return {name: int(value) for name, value in pairs}
    except (OSError, ValueError):
        return {}


TRIES = 5
"""Of which the fastest counts: what slows a try down is another program."""
MAX_NBYTES = 1 << 30
"""Of memory that is read, enough to be past any cache."""
ROWS = 512
"""Rows of the product, enough for arithmetic to bound it."""


def memory_speed(memory: torch.Tensor) -> float:
    """Bytes a second at which `memory`, any contiguous uint8 tensor, is read and summed up."""
    values = memory.flatten()[: min(memory.nbytes, MAX_NBYTES) // 8 * 8].view(torch.int64)
    return values.nbytes / _fastest(lambda: values.sum(), memory.device)


def product_speed(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations a second of a product with a weight matrix of [rows, columns]."""
    weight = torch.ones(rows, columns, dtype=dtype, device=device)
    x = torch.ones(ROWS, columns, dtype=dtype, device=device)
    return 2 * ROWS * rows * columns / _fastest(lambda: torch.nn.functional.linear(x, weight), device)


def copy_speed(nbytes: int, device: torch.device) -> float:
    """Bytes a second at which a record of `nbytes` is copied from RAM to `device`."""
    here = torch.ones(nbytes, dtype=torch.uint8)
    there = torch.empty(nbytes, dtype=torch.uint8, device=device)
    return nbytes / _fastest(lambda: there.copy_(here), device)


def _fastest(action: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest try, the device's own work included."""

    def tried() -> float:
        started = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    tried()
    return max(1e-9, min(tried() for _ in range(TRIES)))
