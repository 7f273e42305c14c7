"""Triton where it can be used: it comes with CUDA builds of torch, and nothing of edgemoe requires it."""

from __future__ import annotations

import importlib
from types import ModuleType

from bench.device.section import SkippedError
from edgemoe.kernels.triton.availability import missing


def kernels() -> ModuleType:
    """The module `triton_kernels`; SkippedError where Triton cannot be used."""
    if reason := missing():
        raise SkippedError(reason)
    return importlib.import_module("bench.device.triton_kernels")
