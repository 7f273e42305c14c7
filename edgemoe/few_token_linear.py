"""Reads the model's other matrices at memory speed too when few tokens pass through them on a CPU."""

from __future__ import annotations

import types
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from edgemoe.torch_threads import kernels_have_the_cores
from edgemoe.workers import Workers

SMALLEST = 1 << 12
"""Weights with fewer values than this gain nothing over PyTorch's own product."""


def install(model: nn.Module, workers: Workers) -> None:
    """Gives every large `nn.Linear` of `model` a forward with the kernel path. Subclasses keep their own."""
    for module in model.modules():
        if type(module) is nn.Linear and _fits(module.weight):
            module.forward = types.MethodType(_forward(module.weight, workers), module)  # type: ignore[method-assign]


def _fits(weight: torch.Tensor) -> bool:
    from edgemoe import kernels

    usable = weight.device.type == "cpu" and weight.is_contiguous() and weight.numel() >= SMALLEST
    return usable and kernels.row_kernel(weight.dtype, weight.shape[1]) is not None


def _forward(weight: torch.Tensor, workers: Workers) -> Any:
    from edgemoe import kernels

    rows, columns = weight.shape
    kernel = kernels.row_kernel(weight.dtype, columns)
    assert kernel is not None
    matrix = weight.detach().view(torch.uint8).view(1, -1).numpy().view(kernel.unit)
    only_slot = np.zeros(1, np.int64)

    def forward(module: nn.Linear, input: torch.Tensor) -> torch.Tensor:
        tokens = input.numel() // columns
        if not 0 < tokens <= kernel.most_tokens or not kernels_have_the_cores(workers):
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
