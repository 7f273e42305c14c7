from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from edgemoe.kernels.cpu.threads import KernelThreads, torch_threads
from edgemoe.kernels.kernel_weight import KernelWeight, install_kernel_weights

TOKENS = 150
DTYPES = [torch.bfloat16, torch.float32, torch.float16]


class Router(nn.Module):
    """A module of a family, with a weight of its own."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        values = torch.randn(40, 128, generator=torch.Generator().manual_seed(1)) / 11
        self.weight = nn.Parameter(values.to(dtype), requires_grad=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, self.weight)


def installed(dtype: torch.dtype, threads: KernelThreads) -> tuple[Router, Router]:
    plain = Router(dtype)
    fast = copy.deepcopy(plain)
    install_kernel_weights(nn.ModuleList([fast]), threads)
    assert isinstance(fast.weight, KernelWeight)
    return plain, fast


def inputs(tokens: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(tokens, 128, generator=torch.Generator().manual_seed(2)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_are_near_the_plain_ones_and_have_the_same_bits_in_any_company(
    dtype: torch.dtype, threads: KernelThreads
) -> None:
    plain, fast = installed(dtype, threads)
    x = inputs(TOKENS, dtype)
    together = fast(x[None])
    assert together.shape == (1, len(x), 40)
    assert together.dtype is dtype
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    assert torch.allclose(together[0].float(), plain(x).float(), rtol=tolerance, atol=tolerance)
    # What one token gave stays when the next one is computed.
    alone = [fast(row[None]) for row in x]
    assert torch.equal(torch.cat(alone), together[0])


def test_a_weight_made_in_inference_mode_serves_other_modes(threads: KernelThreads) -> None:
    plain, fast = installed(torch.float32, threads)
    x = inputs(1, torch.float32)
    with torch.inference_mode(False), torch.no_grad():
        found = fast(x.clone())
    assert torch.allclose(found, plain(x), rtol=1e-5, atol=1e-5)


def test_other_uses_are_as_before(threads: KernelThreads) -> None:
    plain, fast = installed(torch.bfloat16, threads)
    many = inputs(5, torch.bfloat16)
    other = inputs(3, torch.float32)
    assert torch.equal(F.linear(other, fast.weight.float()), F.linear(other, plain.weight.float()))
    assert type(fast.weight + 1) is torch.Tensor
    assert torch.equal(fast.weight.t().contiguous(), plain.weight.t().contiguous())
    assert fast.state_dict()["weight"].data_ptr() == fast.weight.data_ptr()
    with torch_threads(2):
        # PyTorch has the cores.
        assert torch.equal(fast(many[:2]), plain(many[:2]))


def test_layers_of_pytorch_and_small_weights_keep_theirs(threads: KernelThreads) -> None:
    small, layer = Router(torch.float32), nn.Linear(128, 64)
    small.weight = nn.Parameter(torch.zeros(4, 128))
    install_kernel_weights(nn.ModuleList([small, layer, nn.Embedding(64, 128)]), threads)
    assert type(small.weight) is nn.Parameter
    assert type(layer.weight) is nn.Parameter
