from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from edgemoe.kernels.cpu.threads import KernelThreads, torch_threads


@pytest.fixture
def threads() -> Iterator[KernelThreads]:
    """Two of them, which have the cores: PyTorch has one thread."""
    kept = KernelThreads(2)
    with torch.inference_mode(), torch_threads(1):
        yield kept
    kept.close()
