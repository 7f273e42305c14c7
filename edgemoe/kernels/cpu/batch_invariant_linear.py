"""Products of few tokens: at memory speed, and with the same bits whatever the number of tokens."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from edgemoe.kernels.cpu.threads import Workers, kernels_have_the_cores

SMALLEST = 1 << 12
"""Weights with fewer values than this gain nothing over PyTorch's own product."""


def install_gemv(model: nn.Module, workers: Workers) -> None:
    """Gives every large `nn.Linear` of `model` a forward with the kernel path. Subclasses keep their own."""
    for module in model.modules():
        if type(module) is nn.Linear and _fits(module.weight):
            module.forward = types.MethodType(_forward(module.weight, workers), module)  # type: ignore[method-assign]


def _fits(weight: torch.Tensor) -> bool:
    from edgemoe.kernels.cpu import gemv_kernels

    usable = weight.device.type == "cpu" and weight.is_contiguous() and weight.numel() >= SMALLEST
    return usable and gemv_kernels.row_kernel(weight.dtype, weight.shape[1]) is not None


def _forward(weight: torch.Tensor, workers: Workers) -> Any:
    from edgemoe.kernels.cpu import gemv_kernels

    rows, columns = weight.shape
    kernel = gemv_kernels.row_kernel(weight.dtype, columns)
    assert kernel is not None
    matrix = weight.detach().view(torch.uint8).view(1, -1).numpy().view(kernel.unit)
    only_slot = np.zeros(1, np.int64)

    def forward(module: nn.Linear, input: torch.Tensor) -> torch.Tensor:
        tokens = input.numel() // columns
        if not 0 < tokens <= kernel.max_tokens or not kernels_have_the_cores(workers):
            return F.linear(input, module.weight, module.bias)
        values = kernel.values(input.reshape(tokens, columns))
        out, starts = kernel.results(tokens, rows), np.array([0, tokens])

        def run(first: int, last: int) -> None:
            kernel.run(only_slot, 0, columns, matrix, starts, values, out, first, last)

        workers.split(rows, run, nbytes=weight.nbytes)
        result = torch.from_numpy(out)
        if module.bias is not None:
            result = result + module.bias.float()
        return result.to(input.dtype).view(*input.shape[:-1], rows)

    return forward


class RowByRow(TorchFunctionMode):
    """Within it `F.linear` takes the rows of its input one after the other.

    PyTorch sums a product of one row and one of several in different orders, which now and then differ in a last bit.
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


def install_row_by_row(model: nn.Module, wanted: Callable[[], bool]) -> None:
    """Lets every module that multiplies by a matrix of its own do so row by row whenever `wanted`.

    Those with kernels for few rows (`install_gemv`) always do and stay as they are. What is left, routers and the
    narrowest projections, is small.
    """
    for module in model.modules():
        matrices = any(parameter.dim() == 2 for parameter in module.parameters(recurse=False))
        if matrices and not isinstance(module, nn.Embedding) and "forward" not in vars(module):
            module.forward = _row_by_row(module.forward, wanted)


def _row_by_row(forward: Callable[..., Any], wanted: Callable[[], bool]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not wanted():
            return forward(*args, **kwargs)
        with RowByRow():
            return forward(*args, **kwargs)

    return run
