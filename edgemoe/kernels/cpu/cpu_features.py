"""What the CPU that numba compiles for can do: this one, unless numba's settings cap it."""

from __future__ import annotations

from functools import cache
from typing import Any

import llvmlite.binding as llvm
import numba


@cache
def has(feature: str) -> bool:
    """Whether compiled code may use `feature`, by LLVM's name.

    numba takes the features from `NUMBA_CPU_FEATURES`, or else from the host. A `NUMBA_CPU_NAME` without features names
    a CPU of which LLVM tells nothing here, so only what `BASELINE` lists counts.
    """
    config: Any = numba.config
    if config.CPU_FEATURES is not None:
        return f"+{feature}" in str(config.CPU_FEATURES).split(",")
    if config.CPU_NAME is not None and feature not in BASELINE:
        return False
    return bool(llvm.get_host_cpu_features().get(feature, False))


BASELINE = frozenset({"avx2", "fma", "f16c"})
"""Features of x86-64-v3, which every CPU has whose name somebody would set."""


def is_x86() -> bool:
    """Whether this is an x86 CPU: others have fused multiply-add and conversions of fp16 in their base."""
    return str(llvm.get_process_triple()).startswith(("x86", "i386", "i686", "amd64"))


def float_lanes() -> int:
    """Float32 values in the widest register; LLVM splits what is wider than the CPU's."""
    return 16 if has("avx512f") else 8
