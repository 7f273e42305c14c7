"""Reads the model's other matrices at memory speed too when one or two tokens pass through them on a CPU."""

from __future__ import annotations

import types
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from edgemoe.expert_math import KERNEL_TOKENS
from edgemoe.workers import Workers

SMALLEST = 1 << 16
"""Weights with fewer values than this gain nothing over PyTorch's own product."""


def install(model: nn.Module, workers: Workers) -> None:
    """Gives every bf16 `nn.Linear` of `model` a forward with the kernel path. Subclasses keep their own."""
    for module in model.modules():
        if type(module) is nn.Linear and _fits(module.weight):
            module.forward = types.MethodType(_forward(workers), module)  # type: ignore[method-assign]


def _fits(weight: torch.Tensor) -> bool:
    aligned = weight.is_contiguous() and weight.shape[1] % 2 == 0
    return weight.dtype is torch.bfloat16 and weight.device.type == "cpu" and aligned and weight.numel() >= SMALLEST


def _forward(workers: Workers) -> Any:
    from edgemoe.kernels import gather_bf16

    first_slot = np.zeros(1, np.int64)

    def forward(module: nn.Linear, input: torch.Tensor) -> torch.Tensor:
        rows, columns = module.weight.shape
        tokens = input.numel() // columns
        if not 0 < tokens <= KERNEL_TOKENS:
            return F.linear(input, module.weight, module.bias)
        matrix = module.weight.view(torch.int32).view(1, -1).numpy().view(np.uint32)
        values = input.reshape(tokens, columns).float().numpy()
        out = np.empty((tokens, rows), np.float32)
        chosen, starts = np.arange(tokens), np.array([0, tokens])

        def run(first: int, last: int) -> None:
            gather_bf16(first_slot, 0, columns, matrix, chosen, starts, values, out, first, last)

        workers.split(rows, run, nbytes=module.weight.nbytes)
        result = torch.from_numpy(out)
        if module.bias is not None:
            result = result + module.bias.float()
        return result.to(input.dtype).view(*input.shape[:-1], rows)

    return forward
