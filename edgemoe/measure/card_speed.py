"""How fast a device that is no CPU gets records, reads its memory and takes orders, and the CPU's kernels beside it.

The functions have been tested with stand-ins for a card's streams and reads, and not run on a card.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from edgemoe.cache import ExpertId, accelerator
from edgemoe.cache.cuda_link import CudaStreams, Streams
from edgemoe.cache.host_buffer import HostBuffer
from edgemoe.cache.record import ALIGNMENT, round_up
from edgemoe.cache.slots import SlotRegion
from edgemoe.cache.store import ExpertStore
from edgemoe.checkpoint.experts_module import ExpertsModule
from edgemoe.experts.expert_ffn import FastExperts, TokenGroups
from edgemoe.experts.host_reads import DeviceReads, HostReads
from edgemoe.kernels.cpu.threads import KernelThreads, torch_threads
from edgemoe.plan import machine
from edgemoe.plan.profile import CardSpeed
from edgemoe.runtime import Runtime

HOST_NBYTES = 256 << 20
"""Upper bound of the records in RAM that are copied and multiplied: far larger than any cache of a CPU."""
WINDOW_SECONDS = 0.25
"""Measured time of copies."""
MAX_COPIES = 256
"""Copies that are queued at a time: a device's queue takes no more than about 1,000 operations, of which each is 3."""
LAUNCHES = 200
"""Kernels that are queued in one measured run, fewer than a device's queue takes."""
READS = 50
"""Host reads of one measured run."""
CHOICE = 8
"""Numbers of a host read: the experts that one token chooses in one layer."""
TRIES = 5
"""Measured runs, of which the fastest counts: other programs can only slow one down."""

Clock = Callable[[], float]
Kernel = Callable[[], int]
"""Multiplies experts with the CPU's kernels; returns the bytes of their records."""


def measure_card(runtime: Runtime, moe: ExpertsModule, top_k: int) -> CardSpeed:
    """Measures the device of `runtime`, which must be no CPU, in some seconds.

    Takes up to `HOST_NBYTES` of page-locked RAM and one record's bytes of the device meanwhile. `moe` is the first MoE
    layer, `top_k` the experts that a token chooses in it.
    """
    pool, threads = runtime.cache.pool, runtime.kernel_threads
    device, reads = pool.device, DeviceReads(pool.device)
    target = torch.empty(moe.layout.nbytes, dtype=torch.uint8, device=device)
    vram = machine.memory_speed(pool.memory)

    def finish() -> None:
        accelerator.synchronize(device)

    with some_records(runtime.cache.store, moe) as records, torch_threads(1), torch.inference_mode():
        kernel = cpu_kernel(moe.module(runtime.model), moe, records, top_k, threads, runtime.model.dtype)
        pcie, cpu, pcie_beside, cpu_beside = link_and_kernel(CudaStreams(device), records, target, kernel)
        launch = launch_seconds(torch.zeros(1, device=device), finish)
        read = read_seconds(reads, torch.zeros(CHOICE, dtype=torch.int32, device=device))
    reads.close()
    return CardSpeed(pcie, pcie_beside, vram, launch, read, cpu, cpu_beside)


@contextmanager
def some_records(store: ExpertStore, moe: ExpertsModule) -> Iterator[torch.Tensor]:
    """Records of the first layer in page-locked RAM, where the system gives any: uint8 [records, slot bytes]."""
    nbytes = round_up(moe.layout.nbytes, ALIGNMENT)
    count = max(1, min(moe.experts, HOST_NBYTES // nbytes))
    buffer = HostBuffer(count * nbytes, pin=True)
    try:
        records = buffer.memory.view(count, nbytes)
        for number in range(count):
            for _, move in store.pieces(ExpertId(0, number), records[number]):
                move()
        yield records
    finally:
        buffer.close()


def cpu_kernel(
    module: Any, moe: ExpertsModule, records: torch.Tensor, top_k: int, threads: KernelThreads, dtype: torch.dtype
) -> Kernel | None:
    """Multiplies one token's `top_k` experts of `records`, uint8 [records, slot bytes], others each time.

    None where the CPU has no kernels for them. `module` is the experts module of transformers, `dtype` the model's.
    """
    if not FastExperts.fits(moe):
        return None
    experts, count = FastExperts(module, moe, SlotRegion(records, 0), threads, dtype), len(records)
    hidden_size = moe.matrix_shape("down_proj")[0]
    hidden, index = torch.zeros(1, hidden_size, dtype=dtype), torch.arange(top_k)[None]
    weights = torch.full((1, top_k), 1 / top_k, dtype=dtype)
    turns = 0

    def run() -> int:
        nonlocal turns
        groups = TokenGroups(hidden, index, weights, top_k)
        experts.compute(groups, range(top_k), [(turns * top_k + number) % count for number in range(top_k)])
        turns += 1
        return top_k * moe.layout.nbytes

    return run


def link_and_kernel(
    streams: Streams,
    records: torch.Tensor,
    target: torch.Tensor,
    kernel: Kernel | None,
    clock: Clock = time.perf_counter,
) -> tuple[float, float, float, float]:
    """Bytes per second of copies and of `kernel`: each alone, then each beside the other. 0 for a missing `kernel`.

    Copies are of one of `records`, [records, at least record bytes], to `target`, uint8 [record bytes] on the device.
    They share the RAM with the kernel, so that both together are slower than each alone.
    """
    first = streams.copy(target, records[0][: len(target)], None)
    streams.block(first[1])
    one = max(streams.seconds(*first), 1e-9)
    count = max(2, min(MAX_COPIES, math.ceil(WINDOW_SECONDS / one)))
    copies = Copies(streams, records, target, count)
    streams.block(copies.last)
    pcie = copies.speed(0)
    if kernel is None:
        return pcie, 0.0, pcie, 0.0
    kernel()
    ends = clock() + WINDOW_SECONDS
    cpu = kernel_speed(kernel, lambda: clock() < ends, clock)
    copies = Copies(streams, records, target, count)
    # Copies that ended before all were queued had no kernel beside them.
    begun = copies.count_passed()
    cpu_beside = kernel_speed(kernel, lambda: not streams.passed(copies.last), clock)
    streams.block(copies.last)
    return pcie, cpu, copies.speed(min(begun, count - 1)), cpu_beside


class Copies:
    """Copies of one record after the other, queued at once."""

    def __init__(self, streams: Streams, records: torch.Tensor, target: torch.Tensor, count: int) -> None:
        self._streams = streams
        self._nbytes = len(target)
        sources = (records[number % len(records)][: len(target)] for number in range(count))
        self._events = [streams.copy(target, source, None) for source in sources]

    @property
    def last(self) -> Any:
        """The event at the end of the last one."""
        return self._events[-1][1]

    def count_passed(self) -> int:
        """The number of those that have ended."""
        return sum(self._streams.passed(end) for _, end in self._events)

    def speed(self, begun: int) -> float:
        """Bytes per second of those from number `begun` on. All must have ended."""
        seconds = self._streams.seconds(self._events[begun][0], self.last)
        return (len(self._events) - begun) * self._nbytes / max(seconds, 1e-9)


def kernel_speed(kernel: Kernel, going_on: Callable[[], bool], clock: Clock = time.perf_counter) -> float:
    """Bytes per second of the runs of `kernel` that end while `going_on`; of one run where none does."""
    nbytes, seconds, started = 0, 0.0, clock()
    while True:
        more, now = kernel(), clock()
        if nbytes and not going_on():
            return nbytes / max(seconds, 1e-9)
        nbytes, seconds = nbytes + more, now - started


def launch_seconds(value: torch.Tensor, finish: Callable[[], object], clock: Clock = time.perf_counter) -> float:
    """Seconds of the host to queue one of PyTorch's kernels, which writes `value`, of one element on the device.

    `finish` waits for the device.
    """

    def tried() -> float:
        finish()
        started = clock()
        for _ in range(LAUNCHES):
            value.fill_(1)
        return (clock() - started) / LAUNCHES

    tried()
    found = min(tried() for _ in range(TRIES))
    finish()
    return found


def read_seconds(reads: HostReads, ids: torch.Tensor, clock: Clock = time.perf_counter) -> float:
    """Seconds from the start of a host read of `ids`, on a device with nothing else to do, to its values."""

    def tried() -> float:
        started = clock()
        for _ in range(READS):
            reads.start([ids]).wait()
        return (clock() - started) / READS

    tried()
    return min(tried() for _ in range(TRIES))
