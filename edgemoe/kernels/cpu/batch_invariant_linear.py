"""Batch-invariant linear layers: a token's product has the same bits whatever tokens are computed with it."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from edgemoe.formats.float_format import FloatFormat
from edgemoe.kernels.cpu.kernel_choice import widens
from edgemoe.kernels.cpu.packed_matrix import PackedMatrix
from edgemoe.kernels.cpu.threads import KernelThreads, kernels_have_the_cores, torch_threads

MIN_VALUES = 1 << 12
"""Values of a weight below which a GEMV kernel is no faster than PyTorch's product."""


def install_gemv(model: nn.Module, threads: KernelThreads) -> None:
    """Replaces the forward of every large `nn.Linear` of `model` by one that uses GEMV kernels for few tokens.

    Subclasses of `nn.Linear`, and weights without a kernel, keep their forward. The weights must stay where they are.
    """
    for module in model.modules():
        if type(module) is nn.Linear and _fits(module.weight):
            own = _widening_forward if widens(module.weight.dtype, module.weight.shape[1]) else _forward
            module.forward = types.MethodType(own(module.weight, threads), module)  # type: ignore[method-assign]


def _fits(weight: torch.Tensor) -> bool:
    from edgemoe.kernels.cpu import gemv_kernels

    usable = weight.device.type == "cpu" and weight.is_contiguous() and weight.numel() >= MIN_VALUES
    return usable and gemv_kernels.row_kernel(weight.dtype, weight.shape[1]) is not None


def _widening_forward(weight: torch.Tensor, threads: KernelThreads) -> Any:
    matrix = PackedMatrix.of_views(FloatFormat(weight.dtype), {"": weight.detach()}, "", weight.shape[1])

    def forward(module: nn.Linear, input: torch.Tensor) -> torch.Tensor:
        if not input.numel() or not kernels_have_the_cores(threads):
            return F.linear(input, module.weight, module.bias)
        result = matrix.multiply_one(threads, input.reshape(-1, weight.shape[1]))
        if module.bias is not None:
            result = result + module.bias.float()
        return result.to(input.dtype).view(*input.shape[:-1], weight.shape[0])

    return forward


def _forward(weight: torch.Tensor, threads: KernelThreads) -> Any:
    from edgemoe.kernels.cpu import gemv_kernels

    rows, columns = weight.shape
    kernel = gemv_kernels.row_kernel(weight.dtype, columns)
    assert kernel is not None
    matrix = weight.detach().view(torch.uint8).view(1, -1).numpy().view(kernel.unit)
    only_slot = np.zeros(1, np.int64)

    def forward(module: nn.Linear, input: torch.Tensor) -> torch.Tensor:
        tokens = input.numel() // columns
        if tokens > kernel.max_tokens:
            # Also where kernels have the cores otherwise, as with packed experts.
            with torch_threads(max(threads.count, torch.get_num_threads())):
                return F.linear(input, module.weight, module.bias)
        if not tokens or not kernels_have_the_cores(threads):
            return F.linear(input, module.weight, module.bias)
        values = kernel.values(input.reshape(tokens, columns))
        out, starts = kernel.results(tokens, rows), np.array([0, tokens])

        def run(first: int, last: int) -> None:
            kernel.run(only_slot, 0, columns, matrix, starts, values, out, first, last)

        threads.split(rows, run, nbytes=weight.nbytes)
        result = torch.from_numpy(out)
        if module.bias is not None:
            result = result + module.bias.float()
        return result.to(input.dtype).view(*input.shape[:-1], rows)

    return forward


class BatchInvariantMode(TorchFunctionMode):
    """In this mode `F.linear` multiplies one row of its input at a time.

    PyTorch sums in another order for several rows than for one, so the last bit may differ.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """See PyTorch's TorchFunctionMode."""
        kwargs = kwargs or {}
        if func is not F.linear or not args:
            return func(*args, **kwargs)
        input, *others = args
        rows = input.reshape(-1, 1, input.shape[-1])
        return torch.cat([func(row, *others, **kwargs) for row in rows]).view(*input.shape[:-1], -1)


def install_batch_invariance(model: nn.Module, wanted: Callable[[], bool]) -> None:
    """Wraps the forward of every module of `model` with a matrix of its own: batch-invariant whenever `wanted()`.

    Modules with a GEMV kernel (`install_gemv`, called before) are batch-invariant already and are left out. The others,
    routers and narrow projections, are small enough for one product per row.
    """
    for module in model.modules():
        matrices = any(parameter.dim() == 2 for parameter in module.parameters(recurse=False))
        if matrices and not isinstance(module, nn.Embedding) and "forward" not in vars(module):
            module.forward = _batch_invariant(module.forward, wanted)


def _batch_invariant(forward: Callable[..., Any], wanted: Callable[[], bool]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not wanted():
            return forward(*args, **kwargs)
        with BatchInvariantMode():
            return forward(*args, **kwargs)

    return run
