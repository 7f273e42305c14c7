"""This machine: memory within control-group limits, cores, GPUs, and measured speeds."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from edgemoe.cache import accelerator
from edgemoe.cache.host_buffer import HostBuffer

CGROUP_ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Gpu:
    """A CUDA device as the driver reports it; sizes in bytes."""

    index: int
    name: str
    total: int
    free: int
    capability: tuple[int, int] | None = None
    """NVIDIA's compute capability, such as (8, 6); None where the driver does not say."""
    driver: str = ""
    """Its version; empty where it does not say."""
    lanes: int = 0
    """PCIe lanes in use; 0 where the driver does not say."""
    max_lanes: int = 0
    """PCIe lanes that the card has; 0 where the driver does not say."""


@dataclass(frozen=True)
class GroupLimit:
    """A control group's memory in bytes: its hard limit, and its usage without what the kernel can reclaim."""

    limit: int
    used: int


def ram_free() -> int:
    """Bytes of RAM that this process can still allocate, within the limits of its control groups."""
    free = psutil.virtual_memory().available
    return max(0, min([free, *(group.limit - group.used for group in group_limits())]))


def ram_limit() -> int:
    """Bytes of RAM that this process may use in all, within the limits of its control groups."""
    return min([psutil.virtual_memory().total, *(group.limit for group in group_limits())])


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_quota(root: Path = CGROUP_ROOT, membership: Path = Path("/proc/self/cgroup")) -> float | None:
    """Cores whose time this process's control groups give it, such as 1.5; None where nothing limits it."""
    found: list[float] = []
    names: tuple[str, ...]
    for controllers, path in _groups(membership):
        if "cpu" in controllers.split(","):
            base, names = root / "cpu", ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        elif controllers == "":
            base, names = root, ("cpu.max",)
        else:
            continue
        for folder in _folders_to(base, path):
            with suppress(OSError, ValueError):
                quota, period = " ".join((folder / name).read_text() for name in names).split()
                if int(quota) > 0:
                    found.append(int(quota) / int(period))
    return min(found, default=None)


def processor_name() -> str:
    """The processor's model, as the system reports it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def group_limits(root: Path = CGROUP_ROOT, membership: Path = Path("/proc/self/cgroup")) -> list[GroupLimit]:
    """The memory limits of this process's control group and its ancestors, in hierarchies v1 and v2.

    The kernel counts page cache as usage. Here it is left out, since the kernel reclaims it when memory is short.
    """
    found: list[GroupLimit] = []
    for controllers, path in _groups(membership):
        if "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", "total_active_file")
            found += _limits_of(root / "memory", path, *names)
        elif controllers == "":
            found += _limits_of(root, path, "memory.max", "memory.current", "inactive_file", "active_file")
    return found


def gpus() -> list[Gpu]:
    """The CUDA devices that the driver reports; empty without a driver."""
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
    capability: tuple[int, int] | None = None
    with suppress(pynvml.NVMLError):
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
        capability = int(major), int(minor)
    driver, lanes, max_lanes = "", 0, 0
    with suppress(pynvml.NVMLError):
        driver = str(pynvml.nvmlSystemGetDriverVersion())
        lanes = int(pynvml.nvmlDeviceGetCurrPcieLinkWidth(handle))
        max_lanes = int(pynvml.nvmlDeviceGetMaxPcieLinkWidth(handle))
    name = str(pynvml.nvmlDeviceGetName(handle))
    return Gpu(index, name, int(memory.total), int(memory.free), capability, driver, lanes, max_lanes)


def gpu_nbytes(name: str) -> int:
    """Bytes of memory of the device that the driver calls `name`; 0 where it knows none, as without a driver.

    By name, since PyTorch and the driver number devices differently; of several of one name, the first.
    """
    return next((gpu.total for gpu in gpus() if gpu.name == name), 0)


def _limits_of(base: Path, path: str, limit: str, usage: str, *cached: str) -> Iterator[GroupLimit]:
    """The limits of the group at `path` and of its ancestors."""
    for folder in _folders_to(base, path):
        allowed, used = _number(folder / limit), _number(folder / usage)
        if allowed is not None and used is not None and allowed < psutil.virtual_memory().total:
            reclaimable = _stat(folder / "memory.stat")
            yield GroupLimit(allowed, max(0, used - sum(reclaimable.get(name, 0) for name in cached)))


def _groups(membership: Path) -> list[tuple[str, str]]:
    """The controllers and the path of each hierarchy of control groups; empty where the system has none."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return []
    return [(controllers, path) for _, controllers, path in (line.split(":", 2) for line in lines)]


def _folders_to(base: Path, path: str) -> Iterator[Path]:
    """The folder of the group at `path` and those of its ancestors; in a container, `path` may not exist."""
    folder = base / path.lstrip("/")
    if not folder.exists():
        folder = base
    while True:
        yield folder
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
"""Timed runs of each measurement. The fastest counts: other programs can only slow one down."""
MAX_READ_NBYTES = 1 << 30
"""Upper bound of the memory that is read; far larger than any CPU cache."""
PRODUCT_ROWS = 512
"""Rows of the input of the measured product, enough for arithmetic to bound it."""


def memory_speed(memory: torch.Tensor) -> float:
    """Bytes per second of reading and summing `memory`, a contiguous uint8 tensor."""
    values = memory.flatten()[: min(memory.nbytes, MAX_READ_NBYTES) // 8 * 8].view(torch.int64)
    return values.nbytes / _fastest(lambda: values.sum(), memory.device)


def product_speed(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations per second of a product with a weight matrix [rows, columns]."""
    weight = torch.ones(rows, columns, dtype=dtype, device=device)
    x = torch.ones(PRODUCT_ROWS, columns, dtype=dtype, device=device)
    return 2 * PRODUCT_ROWS * rows * columns / _fastest(lambda: torch.nn.functional.linear(x, weight), device)


def copy_speed(nbytes: int, device: torch.device) -> float:
    """Bytes per second of copying `nbytes` bytes to `device`, from page-locked RAM where the system gives any."""
    here = HostBuffer(nbytes, pin=accelerator.is_accelerator(device))
    here.memory.fill_(1)
    there = torch.empty(nbytes, dtype=torch.uint8, device=device)
    try:
        return nbytes / _fastest(lambda: there.copy_(here.memory, non_blocking=True), device)
    finally:
        here.close()


def _fastest(action: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of `TRIES` runs; waits for the device to finish each."""

    def tried() -> float:
        started = time.perf_counter()
        action()
        if accelerator.is_accelerator(device):
            accelerator.synchronize(device)
        return time.perf_counter() - started

    tried()
    return max(1e-9, min(tried() for _ in range(TRIES)))
