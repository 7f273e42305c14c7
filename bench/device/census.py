"""What one decoding step on a card consists of: waits of the host, launches, replayed graphs, kernels and copies."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile

from edgemoe import Engine, Sampling
from edgemoe.experts import host_reads

STEPS = 4
"""That each count is the mean of."""
UNTIMED = 4
"""Steps before those that are counted: they capture and compile."""
EXPERTS = ("_up", "_down")
"""How the kernels are called that read the experts' weights for few tokens."""


@dataclass
class _Waits:
    """What the host waited for."""

    reads: int = 0
    """Reads of the card, such as routers' choices, that had not arrived when they were asked for."""
    hidden: int = 0
    """Other operations of which PyTorch says that the host waits for the card."""


def census(engine: Engine, ids: Sequence[int]) -> dict[str, float]:
    """Counts a layer of a step, and the card's milliseconds a step in kernels.

    A replay of a graph is one launch of its own kind: the kernels in graphs are those that no launch of the host
    accounts for. Memory copies are those between the host and the card that run by themselves or in graphs.
    """
    layers = engine.plan.layers
    stream = engine.stream(list(ids), Sampling(temperature=0.0, max_tokens=2 * STEPS + UNTIMED + 2, ignore_eos=True))
    try:
        for _ in range(UNTIMED):
            next(stream)
        with _counted_waits() as waits:
            _take(stream)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            _take(stream)
            torch.cuda.synchronize()
    finally:
        stream.close()
    counted = counts(list(seen.events() or []))
    a_layer = {
        f"{name}_a_layer": round(count / STEPS / layers, 2)
        for name, count in {"reads": waits.reads, "hidden_waits": waits.hidden, **counted}.items()
        if not name.endswith("_us")
    }
    return a_layer | {
        "kernel_ms_a_step": round(counted["kernel_us"] / STEPS / 1e3, 3),
        "expert_kernel_ms_a_step": round(counted["expert_kernel_us"] / STEPS / 1e3, 3),
    }


def counts(events: Sequence[Any]) -> dict[str, float]:
    """Launches, graph replays, kernels and copies among a profile's events, and microseconds of the card in kernels."""
    on_card = [each for each in events if each.device_type.name == "CUDA"]
    copies = [each for each in on_card if "memcpy" in each.name.lower()]
    kernels = [each for each in on_card if not any(word in each.name.lower() for word in ("memcpy", "memset"))]
    calls = [each.name for each in events if each.device_type.name == "CPU"]
    # "cudaLaunchKernel", "cuLaunchKernelEx", ...: PyTorch's come from the runtime and Triton's from the driver.
    launches = sum("LaunchKernel" in name for name in calls)
    experts = [each for each in kernels if each.name.startswith(EXPERTS)]
    return {
        "launches": launches,
        "graph_replays": sum("GraphLaunch" in name for name in calls),
        "kernels": len(kernels),
        "kernels_in_graphs": max(0, len(kernels) - launches),
        "copies": len(copies),
        "kernel_us": sum(each.device_time for each in kernels),
        "expert_kernel_us": sum(each.device_time for each in experts),
    }


def _take(stream: Iterator[Any]) -> None:
    for _ in range(STEPS):
        next(stream)


@contextmanager
def _counted_waits() -> Iterator[_Waits]:
    """Counts in the block. Blocking reads by events are none of those that PyTorch tells of."""
    waits, read = _Waits(), host_reads._DeviceRead.wait

    def wait(own: Any) -> list[torch.Tensor]:
        waits.reads += not own.arrived()
        return read(own)

    with mock.patch.object(host_reads._DeviceRead, "wait", wait), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode("default")
            waits.hidden = sum("synchronizing" in str(each.message) for each in said)
