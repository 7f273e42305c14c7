"""Batch-invariant linear layers: a token's product has the same bits whatever tokens are computed with it."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from edgemoe.formats.float_format import FloatFormat
from edgemoe.kernels.cpu.kernel_choice import widens
from edgemoe.kernels.cpu.packed.packed_matrix import PackedMatrix
from edgemoe.kernels.cpu.slot_matrix import SlotMatrix
from edgemoe.kernels.cpu.threads import KernelThreads, at_least_torch_threads, kernels_have_the_cores
from edgemoe.kernels.packed_layers import PackedLinear

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


BY_TOKENS = (F.linear, F.silu, F.gelu, F.softplus, torch.sigmoid, torch.Tensor.sigmoid)
"""What PyTorch sums in another order for several rows than for one, or computes in another way at the end of a tensor
that does not fill the registers."""
WHOLE_REGISTERS = 64
"""Values of a row whose exponentials PyTorch computes in the same way wherever it lies, in every dtype."""


class BatchInvariantMode(TorchFunctionMode):
    """In this mode the functions `BY_TOKENS` get one token at a time, with the shape that it has alone."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """See PyTorch's TorchFunctionMode."""
        kwargs = kwargs or {}
        if not args or func not in BY_TOKENS:
            return func(*args, **kwargs)
        input, *others = args
        # [tokens, ...], or [1, tokens, ...].
        dim = 1 if input.dim() > 2 and len(input) == 1 else 0
        tokens = input[0] if dim else input
        # With the strides that the only token of a pass has: PyTorch looks at those of dimensions of one, too.
        alone = (token.reshape(*[1] * (dim + 1), *token.shape) for token in tokens)
        return torch.cat([func(token, *others, **kwargs) for token in alone], dim)


def install_batch_invariance(model: nn.Module, wanted: Callable[[], bool]) -> None:
    """Wraps the forward of modules of `model`: batch-invariant whenever `wanted()`.

    They are those with a matrix of their own but no GEMV kernel (`install_gemv`, called before), routers and narrow
    projections, which are small enough for one product per row, and those with scores or gates of an odd width.
    """
    for module in model.modules():
        matrices = any(parameter.dim() == 2 for parameter in module.parameters(recurse=False))
        odd = any(getattr(child, "out_features", 0) % WHOLE_REGISTERS for child in module.children())
        if (matrices or odd) and not isinstance(module, nn.Embedding) and "forward" not in vars(module):
            module.forward = _batch_invariant(module.forward, wanted)


def _batch_invariant(forward: Callable[..., Any], wanted: Callable[[], bool]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not wanted():
            return forward(*args, **kwargs)
        with BatchInvariantMode():
            return forward(*args, **kwargs)

    return run
