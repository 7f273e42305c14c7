"""Caps the instructions that this process uses, so that a newer CPU stands in for an ordinary one."""

from __future__ import annotations

import os
import sys

CAPS = {
    "avx2": {
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": ",".join(
            f"+{name}" for name in ("avx", "avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "popcnt", "sse4.2")
        ),
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    }
}
"""What numba, PyTorch, oneDNN and MKL read when they are first imported, by the set of instructions."""


def run_again_capped(isa: str) -> None:
    """Replaces this process by the same command under the caps; returns where it is under them already.

    oneDNN's list of sets begins at SSE4.1, and leaves AMX and AVX512 out from `AVX2` on.
    """
    caps = CAPS[isa]
    if all(os.environ.get(name) == value for name, value in caps.items()):
        return
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | caps)
