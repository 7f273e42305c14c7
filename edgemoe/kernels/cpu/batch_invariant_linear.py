"""Batch-invariant linear layers: a token's product has the same bits whatever tokens are computed with it."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from edgemoe.formats.float_format import FloatFormat
from edgemoe.kernels.cpu.kernel_choice import widens
from edgemoe.kernels.cpu.packed_matrix import PackedMatrix
from edgemoe.kernels.cpu.threads import KernelThreads, at_least_torch_threads, kernels_have_the_cores

MIN_VALUES = 1 << 12
"""Values of a weight below which a GEMV kernel is no faster than PyTorch's product."""
MIN_THREADED_NBYTES = 1 << 26
"""Tokens times bytes of a weight from which its product runs on several of PyTorch's threads in any pass."""


def install_gemv(model: nn.Module, threads: KernelThreads) -> None:
    """Replaces the forward of every large `nn.Linear` of `model` by one that uses GEMV kernels for few tokens.

    Subclasses of `nn.Linear`, and weights without a kernel, keep their forward. The weights must stay where they are.
    """
    for module in model.modules():
        if type(module) is nn.Linear and _fits(module.weight):
            module.forward = types.MethodType(_forward(module.weight, threads), module)  # type: ignore[method-assign]


def _fits(weight: torch.Tensor) -> bool:
    from edgemoe.kernels.cpu import gemv_kernels

    usable = weight.device.type == "cpu" and weight.is_contiguous() and weight.numel() >= MIN_VALUES
    return usable and gemv_kernels.row_kernel(weight.dtype, weight.shape[1]) is not None


def _forward(weight: torch.Tensor, threads: KernelThreads) -> Any:
    rows, columns = weight.shape
    multiply, most = _product(weight.detach(), threads)

    def forward(module: nn.Linear, input: torch.Tensor) -> torch.Tensor:
        tokens = input.numel() // columns
        if tokens > most and tokens * weight.nbytes >= MIN_THREADED_NBYTES:
            # Also where kernels have the cores otherwise, as with packed experts.
            with at_least_torch_threads(threads.count):
                return F.linear(input, module.weight, module.bias)
        if not 0 < tokens <= most or not kernels_have_the_cores(threads):
            return F.linear(input, module.weight, module.bias)
        result = multiply(input.reshape(tokens, columns))
        if module.bias is not None:
            result = result + module.bias.float()
        return result.to(input.dtype).view(*input.shape[:-1], rows)

    return forward


def _product(weight: torch.Tensor, threads: KernelThreads) -> tuple[Callable[[torch.Tensor], torch.Tensor], int]:
    """What multiplies inputs [tokens, columns] by `weight`, to float32 [tokens, rows], and for how many tokens."""
    from edgemoe.kernels.cpu import gemv_kernels

    rows, columns = weight.shape
    if widens(weight.dtype, columns):
        widened = PackedMatrix.of_views(FloatFormat(weight.dtype), {"": weight}, "", columns)
        return partial(widened.multiply_one, threads), widened.max_tokens
    kernel = gemv_kernels.row_kernel(weight.dtype, columns)
    assert kernel is not None
    matrix = weight.view(torch.uint8).view(1, -1).numpy().view(kernel.unit)
    only_slot = np.zeros(1, np.int64)

    def multiply(x: torch.Tensor) -> torch.Tensor:
        values, out, starts = kernel.values(x), kernel.results(len(x), rows), np.array([0, len(x)])

        def run(first: int, last: int) -> None:
            kernel.run(only_slot, 0, columns, matrix, starts, values, out, first, last)

        threads.split(rows, run, nbytes=weight.nbytes)
        return torch.from_numpy(out)

    return multiply, kernel.max_tokens


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
