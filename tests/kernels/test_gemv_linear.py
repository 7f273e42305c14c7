from __future__ import annotations

import pytest
import torch
from torch import nn

from edgemoe.kernels import batch_invariant_linear
from edgemoe.kernels.cpu.threads import KernelThreads

ROWS, COLUMNS = 300, 256
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}


def linear(dtype: torch.dtype, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(COLUMNS, ROWS, bias=bias).to(dtype).requires_grad_(False)


@pytest.fixture
def threads() -> KernelThreads:
    return KernelThreads(1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1,), (2,), (1, 1), (1, 2), (5,), (2, 3), (70,)])
def test_the_product_is_that_of_float64(
    dtype: torch.dtype, bias: bool, shape: tuple[int, ...], threads: KernelThreads
) -> None:
    module = linear(dtype, bias=bias)
    batch_invariant_linear.install_gemv(nn.Sequential(module), threads)
    x = torch.randn(*shape, COLUMNS).to(dtype)
    truth = x.double() @ module.weight.double().t() + (module.bias.double() if bias else 0)
    out = module(x)
    assert out.dtype is dtype
    assert out.shape == (*shape, ROWS)
    assert (out.double() - truth).abs().max() <= TOLERANCE[dtype] * truth.abs().max()


def test_a_strided_input_is_read_correctly(threads: KernelThreads) -> None:
    module = linear(torch.float32)
    batch_invariant_linear.install_gemv(nn.Sequential(module), threads)
    x = torch.randn(COLUMNS, 4).t()
    torch.testing.assert_close(module(x[2:3]), nn.functional.linear(x[2:3], module.weight, module.bias))


def test_an_empty_input_is_no_error(threads: KernelThreads) -> None:
    module = linear(torch.bfloat16)
    batch_invariant_linear.install_gemv(nn.Sequential(module), threads)
    assert module(torch.empty(0, COLUMNS, dtype=torch.bfloat16)).shape == (0, ROWS)


def test_only_large_plain_linears_are_replaced(threads: KernelThreads) -> None:
    class Own(nn.Linear):
        """A family's own linear layer."""

    small, own, double = nn.Linear(8, 8), Own(COLUMNS, ROWS), nn.Linear(COLUMNS, ROWS).double()
    large = nn.Linear(COLUMNS, ROWS)
    batch_invariant_linear.install_gemv(nn.ModuleList([small, own, double, large]), threads)
    assert ["forward" in vars(module) for module in (small, own, double, large)] == [False, False, False, True]


def test_rows_split_over_threads_are_the_same_bits() -> None:
    torch.manual_seed(0)
    module = nn.Linear(2048, 1000).bfloat16().requires_grad_(False)
    x = torch.randn(1, 2048).bfloat16()
    results = []
    for count in (1, 3):
        threads = KernelThreads(count)
        batch_invariant_linear.install_gemv(nn.Sequential(module), threads)
        results.append(module(x))
        threads.close()
        del module.forward
    assert torch.equal(*results)
