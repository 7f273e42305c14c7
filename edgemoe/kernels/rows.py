"""Rows of a matrix, collected for a kernel or distributed after it, as its steps: PyTorch has none in between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from edgemoe.kernels.cpu.arrays import Job, address

if TYPE_CHECKING:
    from edgemoe.kernels.cpu.program import Step


def gathered(x: torch.Tensor, places: list[int], dtype: torch.dtype) -> tuple[torch.Tensor, list[Step]]:
    """Where the rows of `x` at `places` will be, [places, columns] of `dtype`, and the steps that write them.

    `x` is [rows, columns] of any float dtype.
    """
    # Imported late: importing numba is slow.
    from edgemoe.kernels.cpu import row_kernels
    from edgemoe.kernels.cpu.program import Step

    if len(x) == 1:
        return x.to(dtype).expand(len(places), -1), []
    kernel = {
        (torch.bfloat16, torch.bfloat16): row_kernels.gather_bf16,
        (torch.bfloat16, torch.float32): row_kernels.gather_widened,
        (torch.float32, torch.float32): row_kernels.gather_f32,
    }.get((x.dtype, dtype))
    if kernel is None:
        return x[places].to(dtype), []
    index, values, columns = np.array(places), x.contiguous(), x.shape[-1]
    out = torch.empty(len(places), columns, dtype=dtype)
    step = columns * values.element_size()
    words = row_kernels.Words(values.data_ptr(), step, out.data_ptr(), columns, address(index))
    return out, [Step(kernel, Job(words, (values, index, out)), len(places), out.nbytes)]


def widened(x: torch.Tensor) -> tuple[torch.Tensor, list[Step]]:
    """`x`, contiguous [rows, columns] that earlier steps write, as float32, and the steps that write it."""
    # Imported late: importing numba is slow.
    from edgemoe.kernels.cpu import row_kernels
    from edgemoe.kernels.cpu.program import Step

    if x.dtype is torch.float32:
        return x, []
    rows, columns = x.shape
    index, out = np.arange(rows), torch.empty(rows, columns)
    words = row_kernels.Words(x.data_ptr(), 2 * columns, out.data_ptr(), columns, address(index))
    return out, [Step(row_kernels.gather_widened, Job(words, (x, index, out)), rows, out.nbytes)]


def in_dtypes(x: torch.Tensor, dtypes: set[torch.dtype]) -> tuple[dict[torch.dtype, torch.Tensor], list[Step]]:
    """Where `x`, see `widened`, will be in each of `dtypes`, its own and float32, and the steps that write it."""
    single, steps = widened(x) if dtypes - {x.dtype} else (x, [])
    return {dtype: x if dtype is x.dtype else single for dtype in dtypes}, steps


def scattered(x: torch.Tensor, places: Sequence[int], out: torch.Tensor) -> list[Step]:
    """The steps that write the rows of `x`, float32 [places, columns], to those of `out` at `places`.

    `out` is contiguous, [rows, columns] of bf16 or float32.
    """
    # Imported late: importing numba is slow.
    from edgemoe.kernels.cpu import row_kernels
    from edgemoe.kernels.cpu.program import Step

    kernel = row_kernels.scatter_bf16 if out.dtype is torch.bfloat16 else row_kernels.scatter_f32
    index = np.array(places)
    words = row_kernels.Words(x.data_ptr(), x.stride(0) * 4, out.data_ptr(), x.shape[-1], address(index))
    return [Step(kernel, Job(words, (x, index, out)), len(places), x.nbytes)]


def sum_step(x: torch.Tensor, other: torch.Tensor, out: torch.Tensor) -> Step:
    """The step that writes the sums of `x` and `other` to `out`: contiguous [rows, columns], all bf16 or float32."""
    # Imported late: importing numba is slow.
    from edgemoe.kernels.cpu import row_kernels
    from edgemoe.kernels.cpu.program import Step

    rows, columns = x.shape
    step = columns * x.element_size()
    words = row_kernels.Words(x.data_ptr(), step, out.data_ptr(), columns, other.data_ptr())
    kernel = row_kernels.add_bf16 if x.dtype is torch.bfloat16 else row_kernels.add_f32
    return Step(kernel, Job(words, (x, other, out)), rows, x.nbytes)
