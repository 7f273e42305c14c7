"""Products with dense matrices for few tokens on a device, to bits that do not depend on the other tokens of a pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from edgemoe.cache.record import RecordLayout
from edgemoe.formats.float_format import NAMES, FloatFormat
from edgemoe.formats.weight_format import WeightFormat
from edgemoe.kernels.triton.grouped_ffn import KINDS, packed_linear_gemv
from edgemoe.kernels.triton.launcher import Launcher
from edgemoe.kernels.triton.tile_format import TileFormat, tile_format


class FewTokenLinears(TorchFunctionMode):
    """In the block, `F.linear` of few tokens is one kernel for all of them, each token summed by itself in float32.

    PyTorch's own products choose another order of additions for another number of tokens. For captures: what a call
    costs in Python is paid once.
    """

    def __init__(self, launcher: Launcher, max_tokens: int) -> None:
        """Products of more than `max_tokens` tokens are PyTorch's."""
        super().__init__()
        self._launcher = launcher
        self._max_tokens = max_tokens
        self._forms: dict[tuple[int, int, torch.dtype], TileFormat | None] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        """See PyTorch's TorchFunctionMode."""
        if func is F.linear:
            found = self._product(*args, **(kwargs or {}))
            if found is not None:
                return found
        return func(*args, **(kwargs or {}))

    def _product(
        self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """The product; None where it is PyTorch's."""
        rows, columns = weight.shape if weight.dim() == 2 else (0, 0)
        # Kernels number the values of a matrix in 32 bits.
        small = weight.numel() < 1 << 31
        usual = small and weight.dtype in NAMES and input.dtype in KINDS and weight.is_contiguous() and rows > 0
        if not usual or input.numel() > self._max_tokens * columns or input.numel() == 0:
            return None
        key = rows, columns, weight.dtype
        if key not in self._forms:
            self._forms[key] = tile_format(FloatFormat(weight.dtype), (rows, columns), {"": 0}, weight.device)
        form = self._forms[key]
        if form is None:
            return None
        flat, memory = input.reshape(-1, columns).contiguous(), weight.detach().view(torch.uint8).view(-1)
        product = packed_linear_gemv(self._launcher, flat, form, memory, rows, input.dtype)
        return (product if bias is None else product + bias).view(*input.shape[:-1], rows)


class PackedDense:
    """One packed matrix on a device, its parts in one block of memory, and the kernel that multiplies by it."""

    def __init__(
        self, launcher: Launcher, kind: WeightFormat, parts: Mapping[str, torch.Tensor], shape: tuple[int, int]
    ) -> None:
        """Copies `parts`, those of `kind.parts("", shape)`, on one device. ValueError where no kernel reads them."""
        layout = RecordLayout(kind.parts("", shape))
        device = next(iter(parts.values())).device
        form = tile_format(kind, shape, layout.places(""), device)
        if form is None:
            raise ValueError(f"no kernel reads {shape[0]} x {shape[1]} weights of the format {kind.name}")
        self._launcher, self._form, self._rows = launcher, form, shape[0]
        self._memory = torch.empty(layout.nbytes, dtype=torch.uint8, device=device)
        self.parts = layout.views(self._memory)
        """The parts, by the suffixes of their names, as views of the block."""
        for name, part in self.parts.items():
            part.copy_(parts[name])

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """x · Wᵀ in float32, [tokens, rows]; `x` is [tokens, columns]. Each token is summed by itself."""
        return packed_linear_gemv(self._launcher, x, self._form, self._memory, self._rows, torch.float32)
