"""Triton where it is installed: it comes with CUDA builds of torch, and nothing of edgemoe requires it."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from bench.device.section import SkippedError


def kernels() -> ModuleType:
    """The module `triton_kernels`; SkippedError where there is no Triton."""
    if importlib.util.find_spec("triton") is None:
        raise SkippedError("triton is not installed: it comes with CUDA builds of torch")
    return importlib.import_module("bench.device.triton_kernels")
