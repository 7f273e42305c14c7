"""Sums of a token's experts: the kernels against PyTorch, and each token by itself."""

from __future__ import annotations

import pytest
import torch

from edgemoe.kernels.cpu.threads import KernelThreads
from edgemoe.kernels.weighted_sum import fast_weighted_sum, weighted_sum

DTYPES = [torch.bfloat16, torch.float32, torch.float16]


@pytest.mark.parametrize("columns", [1, 40, 2048])
@pytest.mark.parametrize("weights_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_adds_what_pytorch_adds(dtype: torch.dtype, weights_dtype: torch.dtype, columns: int) -> None:
    generator = torch.Generator().manual_seed(columns)
    outputs = torch.randn(5 * 3, columns, generator=generator).to(dtype)
    weights = torch.rand(5, 3, generator=generator).to(weights_dtype)
    threads = KernelThreads(2)
    found = fast_weighted_sum(threads, outputs, weights)
    assert found.dtype is dtype
    expected = (outputs.view(5, 3, columns).double() * weights[..., None].double()).sum(1)
    worst = {torch.float32: 1e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    assert torch.allclose(found.double(), expected, atol=worst)
    assert torch.allclose(found.float(), weighted_sum(outputs, weights).float(), atol=worst)
    alone = [fast_weighted_sum(threads, outputs[3 * at : 3 * at + 3], weights[at : at + 1]) for at in range(5)]
    assert torch.equal(found, torch.cat(alone))
    threads.close()
