"""Products of a few rows, each as if it were alone: to the bits that a step over one token gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


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


def install(model: nn.Module, wanted: Callable[[], bool]) -> None:
    """Lets every module that multiplies by a matrix of its own do so row by row whenever `wanted`.

    Those with kernels for few rows (`few_token_linear`) always do and stay as they are. What is left, routers and the
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
