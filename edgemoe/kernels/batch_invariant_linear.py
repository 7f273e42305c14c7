"""Batch-invariant linear layers: a token's product has the same bits whatever tokens are computed with it."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from edgemoe.formats.float_format import FloatFormat
from edgemoe.kernels.cpu.kernel_choice import widens
from edgemoe.kernels.cpu.packed.packed_matrix import PackedMatrix
from edgemoe.kernels.cpu.slot_matrix import SlotMatrix
from edgemoe.kernels.cpu.threads import KernelThreads, at_least_torch_threads, kernels_have_the_cores
from edgemoe.kernels.packed_layers import PackedLinear
from edgemoe.kernels.row_linear import BATCH_INVARIANT_TOKENS

_ATTRIBUTE = "edgemoe_matrix"
MIN_VALUES = 1 << 12
"""Values of a weight below which a GEMV kernel is no faster than PyTorch's product."""
MIN_THREADED_NBYTES = 1 << 26
"""Tokens times bytes of a weight from which its product runs on several of PyTorch's threads in any pass."""


def install_gemv(model: nn.Module, threads: KernelThreads) -> None:
    """Replaces the forward of every large `nn.Linear` of `model` by one that uses GEMV kernels for few tokens.

    Subclasses of `nn.Linear`, and weights without a kernel, keep their forward. The weights must stay where they are.
    """
    for module in model.modules():
        if type(module) is nn.Linear and has_kernel(module.weight):
            matrix = _matrix(module.weight.detach())
            module.forward = types.MethodType(_forward(module.weight, matrix, threads), module)  # type: ignore[method-assign]
            vars(module)[_ATTRIBUTE] = matrix


def matrix_of(linear: nn.Module) -> SlotMatrix | PackedMatrix | None:
    """What multiplies by the weight of `linear`, where a kernel does."""
    found: SlotMatrix | PackedMatrix | None = (
        linear.matrix if isinstance(linear, PackedLinear) else vars(linear).get(_ATTRIBUTE)
    )
    return found


def batch_invariant_tokens(model: nn.Module, most: int) -> int:
    """Tokens, at most `most`, up to which each has the bits of its own in every packed linear layer and with a kernel.

    The others are to be computed in a `BatchInvariantMode`.
    """
    for module in model.modules():
        matrix = matrix_of(module)
        if matrix is not None:
            most = min(most, matrix.max_tokens)
        elif isinstance(module, PackedLinear):
            most = min(most, BATCH_INVARIANT_TOKENS)
    return most


def has_kernel(weight: torch.Tensor) -> bool:
    """Whether a kernel multiplies by `weight`, [rows, columns], and is faster than PyTorch."""
    usable = weight.device.type == "cpu" and weight.is_contiguous() and weight.numel() >= MIN_VALUES
    return usable and SlotMatrix.fits(weight.dtype, weight.shape[1])


def _forward(weight: torch.Tensor, matrix: SlotMatrix | PackedMatrix, threads: KernelThreads) -> Any:
    rows, columns = weight.shape
    most = matrix.max_tokens

    def forward(module: nn.Linear, input: torch.Tensor) -> torch.Tensor:
        tokens = input.numel() // columns
        if tokens > most and tokens * weight.nbytes >= MIN_THREADED_NBYTES:
            # Also where kernels have the cores otherwise, as with packed experts.
            with at_least_torch_threads(threads.count):
                return F.linear(input, module.weight, module.bias)
        if not 0 < tokens <= most or not kernels_have_the_cores(threads):
            return F.linear(input, module.weight, module.bias)
        result = matrix.multiply_one(threads, input.reshape(tokens, columns))
        if module.bias is not None:
            result = result + module.bias.float()
        return result.to(input.dtype).view(*input.shape[:-1], rows)

    return forward


def _matrix(weight: torch.Tensor) -> SlotMatrix | PackedMatrix:
    """What multiplies by `weight`."""
    columns = weight.shape[1]
    if widens(weight.dtype, columns):
        return PackedMatrix.of_views(FloatFormat(weight.dtype), {"": weight}, "", columns)
    return SlotMatrix.of_weight(weight)
