"""What one decoding step on a card consists of: synchronisations of the host, kernels and copies."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from edgemoe import Engine, Sampling

STEPS = 2
"""That each count is the mean of."""


def census(engine: Engine, ids: Sequence[int]) -> dict[str, float]:
    """Counts a layer, and the card's time in kernels a step."""
    layers = engine.plan.layers
    stream = engine.stream(list(ids), Sampling(temperature=0.0, max_tokens=12, ignore_eos=True))
    try:
        for _ in range(4):
            next(stream)
        waits = _synchronisations(stream)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            for _ in range(STEPS):
                next(stream)
            torch.cuda.synchronize()
    finally:
        stream.close()
    recorded: list[Any] = list(seen.events() or [])
    events = [each for each in recorded if each.device_type.name == "CUDA"]
    copies = [each for each in events if "memcpy" in each.name.lower()]
    kernels = [each for each in events if "memcpy" not in each.name.lower() and "memset" not in each.name.lower()]
    return {
        "synchronisations_a_layer": round(waits / STEPS / layers, 1),
        "kernels_a_layer": round(len(kernels) / STEPS / layers, 1),
        "copies_a_layer": round(len(copies) / STEPS / layers, 1),
        "kernel_ms_a_step": round(sum(each.device_time for each in kernels) / STEPS / 1e3, 2),
    }


def _synchronisations(stream: Iterator[Any]) -> int:
    """How often torch says that the host waited for the card, in `STEPS` steps."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(STEPS):
                next(stream)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(each.message) for each in said)
