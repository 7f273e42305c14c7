"""The processor: what it can do, which kernels follow from that, and who else uses it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

import torch

from edgemoe.cli.doctor.check import NOTE, OK, Check
from edgemoe.cli.render import counted
from edgemoe.kernels.cpu import cpu_features
from edgemoe.plan import machine

_FEATURES = {
    "avx2": "AVX2",
    "avx512f": "AVX512",
    "avx512bf16": "AVX512-BF16",
    "avx512vnni": "AVX512-VNNI",
    "amx-bf16": "AMX",
    "neon": "NEON",
}
_BUSY = 0.5
"""Cores of each core that others keep busy, from which on figures here are not the machine's own."""


def processor() -> Iterator[Check]:
    """Cores, threads, features and kernels."""
    yield Check("processor", OK, f"{machine.processor_name()}, {counted(os.cpu_count() or 1, 'core')}")
    yield _threads(machine.cores(), machine.cpu_quota())
    yield _load(os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0, machine.cores())
    yield _kernels()


def _threads(usable: int, quota: float | None) -> Check:
    """How many threads compute, and whether the system gives them the time."""
    found = f"{usable} of {counted(os.cpu_count() or 1, 'core')} for this process, a thread for each"
    if quota is not None and quota < usable:
        best = max(1, math.floor(quota))
        advice = f"--threads {best} is faster: more are stopped again and again"
        return Check("threads", NOTE, f"{found}, but its control group gives the time of {quota:g} cores", advice)
    return Check("threads", OK, found)


def _load(load: float, usable: int) -> Check:
    """Whether other programs compute; `load` is the mean number of threads that wanted a core in the last minute."""
    found = f"{load:.1f} of {counted(usable, 'core')} busy in the last minute"
    if load > _BUSY * usable:
        return Check("other programs", NOTE, found, "replies are slower and a profile is wrong while others compute")
    return Check("other programs", OK, found)


def _kernels() -> Check:
    """Which kernels multiply bf16, the dtype of most checkpoints, and what would be faster."""
    from edgemoe.kernels.cpu.kernel_choice import few_tokens, widens

    features = ", ".join(name for feature, name in _FEATURES.items() if cpu_features.has(feature)) or "no vector units"
    if not few_tokens(torch.bfloat16):
        return Check(
            "kernels", NOTE, f"none for this processor ({features}): PyTorch multiplies", "expect slow replies"
        )
    if widens(torch.bfloat16, 64):
        why = f"bf16 is widened to float32, as this processor has no AVX512-BF16 ({features})"
        return Check("kernels", NOTE, why, "GGUF's Q8_0 and Q4_K are multiplied in integers and are faster here")
    return Check("kernels", OK, f"bf16 is multiplied as it is ({features})")
