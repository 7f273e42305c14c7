"""Routers by kernel: what the modules choose, for every token as it is alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from edgemoe.kernels.cpu.threads import KernelThreads, torch_threads
from edgemoe.kernels.router import Router, install_routers, router_of

EXPERTS, HIDDEN, TOP_K = 60, 128, 6
TOKENS = 150
DTYPES = [torch.bfloat16, torch.float32]


class Softmax(nn.Module):
    """A router of the usual form."""

    def __init__(self, dtype: torch.dtype, normalises: bool = True, weights: torch.dtype | None = None) -> None:
        super().__init__()
        self.top_k = TOP_K
        self.normalises, self.weights = normalises, weights or dtype
        values = torch.randn(EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(1)) / 4
        self.weight = nn.Parameter(values.to(dtype), requires_grad=False)

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = F.linear(hidden.reshape(-1, HIDDEN), self.weight)
        values, index = F.softmax(logits, dim=-1, dtype=torch.float).topk(self.top_k, dim=-1)
        if self.normalises:
            values = values / values.sum(-1, keepdim=True)
        return logits, values.to(self.weights), index


class Scaled(Softmax):
    """Its weights are no probabilities."""

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits, values, index = super().forward(hidden)
        return logits, 2.5 * values, index


class Sigmoid(Softmax):
    """Another score."""

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = F.linear(hidden.reshape(-1, HIDDEN), self.weight)
        values, index = logits.float().sigmoid().topk(self.top_k, dim=-1)
        return logits, values.to(self.weights), index


class Biased(Softmax):
    """It has a parameter more."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.bias = nn.Parameter(torch.zeros(EXPERTS, dtype=dtype), requires_grad=False)


def installed(module: nn.Module, threads: KernelThreads, wanted: Callable[[], bool] = lambda: True) -> Router | None:
    """The router that is found in `module`, next to its experts."""
    block = nn.Module()
    block.gate, block.experts = module, nn.Module()
    install_routers([(block, EXPERTS)], threads, wanted)
    return router_of(module)


def inputs(tokens: int, dtype: torch.dtype, seed: int = 2) -> torch.Tensor:
    return torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("normalises", [True, False])
@pytest.mark.parametrize(
    ("dtype", "weights"), [(*DTYPES[:1] * 2,), (torch.bfloat16, torch.float32), (*DTYPES[1:] * 2,)]
)
def test_it_chooses_what_the_module_chooses(
    dtype: torch.dtype, weights: torch.dtype, normalises: bool, threads: KernelThreads
) -> None:
    plain, fast = (Softmax(dtype, normalises, weights) for _ in range(2))
    router = installed(fast, threads)
    assert router is not None
    assert (router.normalises, router.weights_dtype) == (normalises, weights)
    x = inputs(TOKENS, dtype)
    logits, values, index = fast(x[None])
    assert logits.dtype is dtype
    assert values.dtype is weights
    expected = plain(x)
    tolerance = 2e-2 if torch.bfloat16 in (dtype, weights) else 1e-5
    assert torch.allclose(logits.float(), expected[0].float(), rtol=tolerance, atol=tolerance)
    assert torch.allclose(values.float(), expected[1].float(), rtol=4 * tolerance)
    # Another way to round decides between experts of nearly the same score.
    assert (index == expected[2]).float().mean() > (0.9 if dtype is torch.bfloat16 else 0.999)
    assert all(len(set(row)) == TOP_K for row in index.tolist())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_gets_the_bits_that_it_has_alone(dtype: torch.dtype, threads: KernelThreads) -> None:
    fast = Softmax(dtype)
    assert installed(fast, threads)
    x = inputs(TOKENS, dtype)
    for tokens in (2, 5, 64, TOKENS):
        together = fast(x[:tokens])
        alone = [fast(row) for row in x[:tokens].split(1)]
        assert all(map(torch.equal, together, map(torch.cat, zip(*alone, strict=True))))


def test_of_equal_scores_the_first_ones_are_chosen(threads: KernelThreads) -> None:
    fast = Softmax(torch.float32)
    assert installed(fast, threads)
    _, values, index = fast(torch.zeros(1, HIDDEN))
    assert index[0].tolist() == list(range(TOP_K))
    assert torch.allclose(values, torch.full_like(values, 1 / TOP_K))


def test_scores_that_are_no_numbers_choose_distinct_experts_and_stay_visible(threads: KernelThreads) -> None:
    fast = Softmax(torch.float32)
    assert installed(fast, threads)
    _, values, index = fast(torch.full((1, HIDDEN), float("nan")))
    assert len(set(index[0].tolist())) == TOP_K
    assert 0 <= int(index.min()) <= int(index.max()) < EXPERTS
    assert values.isnan().all()


@pytest.mark.parametrize("module", [Scaled(torch.float32), Sigmoid(torch.float32), Biased(torch.float32)])
def test_other_routers_stay_as_they_are(module: nn.Module, threads: KernelThreads) -> None:
    assert installed(module, threads) is None
    assert "forward" not in vars(module)


def test_the_module_computes_while_pytorch_has_the_cores_and_whenever_another_routing_is_wanted() -> None:
    threads = KernelThreads(2)
    wanted, called = [True], []

    class Counted(Softmax):
        def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            called.append(len(hidden))
            return super().forward(hidden)

    fast = Counted(torch.float32)
    assert installed(fast, threads, lambda: wanted[0])
    called.clear()
    with torch_threads(1):
        fast(inputs(TOKENS, torch.float32))
    assert called == []
    with torch_threads(2):
        fast(inputs(2, torch.float32))
    wanted[0] = False
    fast(inputs(1, torch.float32))
    assert called == [2, 1]
