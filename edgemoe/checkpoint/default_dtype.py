"""A default dtype for one thread: PyTorch's own is one for the whole process, whose other threads make tensors too."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

SAYS_IT = frozenset({torch.Tensor.float, torch.Tensor.double, torch.Tensor.half, torch.Tensor.bfloat16})
"""Functions whose name is the dtype of their result."""


class DefaultDtype(TorchFunctionMode):
    """A context in which tensors that this thread makes have `dtype` where they would have PyTorch's default."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Calls `func`, and converts a result whose dtype comes from no argument."""
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, torch.Tensor) or result.dtype != torch.get_default_dtype() or func in SAYS_IT:
            return result
        given = (*args, *kwargs.values()) if kwargs else args
        return result if _say_dtype(given) else result.to(self._dtype)


def _say_dtype(given: Iterable[Any]) -> bool:
    """Whether a dtype, or a tensor or an array of floats, is among the arguments."""
    for value in given:
        if isinstance(value, torch.dtype) or "float" in str(getattr(value, "dtype", "")):
            return True
        if isinstance(value, (list, tuple)) and _say_dtype(value):
            return True
    return False
