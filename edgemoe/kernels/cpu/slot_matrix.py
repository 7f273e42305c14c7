"""A matrix of plain floats at one place of records in memory, as the kernels read it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from edgemoe.kernels.cpu.arrays import Groups, Matrix
from edgemoe.kernels.cpu.threads import KernelThreads
from edgemoe.kernels.row_linear import BATCH_INVARIANT_TOKENS

if TYPE_CHECKING:
    from edgemoe.kernels.cpu.program import Step


PORTION = 64
"""Tokens whose inputs stay in the second cache while rows pass."""
ANY_TOKENS = 1 << 20
"""More tokens than any pass has."""


class SlotMatrix:
    """A matrix [rows, columns], or stored transposed, in every record of some memory on the CPU."""

    interleaved = False
    """See `PackedMatrix`."""

    def __init__(
        self,
        dtype: torch.dtype,
        shape: tuple[int, int],
        memory: torch.Tensor,
        offset: int = 0,
        *,
        transposed: bool = False,
    ) -> None:
        """`fits` must hold. `shape` is rows and columns. `memory` is uint8 [records, bytes], `offset` in bytes."""
        from edgemoe.kernels.cpu import gemv_kernels

        self._rows, self._columns = shape
        self.max_tokens = self.most_tokens(dtype, transposed=transposed)
        """Tokens up to which products are summed in one order."""
        self._nbytes = self._rows * self._columns * dtype.itemsize
        self._memory = memory
        own = gemv_kernels.transposed_kernel(dtype) if transposed else gemv_kernels.row_kernel(dtype, self._columns)
        assert own is not None, f"there is no kernel for {dtype}"
        self._kernel, self.inputs = own.loop, own.inputs
        self._multiple = gemv_kernels.ROWS_ACROSS if transposed else gemv_kernels.ROWS_TOGETHER
        parts = (self._rows,) if transposed else ()
        self._matrix = Matrix(memory.data_ptr() + offset, memory.stride(0), self._columns, parts)

    @classmethod
    def of_weight(cls, weight: torch.Tensor) -> SlotMatrix:
        """A contiguous matrix by itself, which must stay where it is."""
        rows, columns = weight.shape
        return cls(weight.dtype, (rows, columns), weight.view(torch.uint8).view(1, -1))

    @staticmethod
    def fits(dtype: torch.dtype, columns: int, *, transposed: bool = False) -> bool:
        """Whether a kernel exists for this dtype, width and orientation."""
        # Imported late: importing numba is slow.
        from edgemoe.kernels.cpu import gemv_kernels

        if transposed:
            return gemv_kernels.transposed_kernel(dtype) is not None
        return gemv_kernels.row_kernel(dtype, columns) is not None

    @staticmethod
    def most_tokens(dtype: torch.dtype, *, transposed: bool = False) -> int:
        """Tokens up to which matrices of `dtype` are summed in one order: PyTorch's products may be faster beyond.

        They are not where the CPU has AVX512-BF16 without AMX.
        """
        # Imported late: importing numba is slow.
        from edgemoe.kernels.cpu.cpu_features import has
        from edgemoe.kernels.cpu.dot_block import PairsOfBf16

        fast = dtype is torch.bfloat16 and PairsOfBf16.available() and not has("amx-bf16")
        return ANY_TOKENS if fast and not transposed else BATCH_INVARIANT_TOKENS

    def product(self, groups: Groups, x: torch.Tensor) -> tuple[torch.Tensor, list[Step]]:
        """Where the products of all pairs will be, float32 [pairs, rows], and the steps that write them.

        `x` is [pairs, columns] of the dtype `inputs`, with contiguous rows; it may be written by earlier steps. The
        slots of `groups` must be pinned.
        """
        from edgemoe.kernels.cpu.gemv_kernels import results
        from edgemoe.kernels.cpu.program import Step

        out, groups = results(len(x), self._rows), groups.in_portions(PORTION)
        job, nbytes = self._matrix.product(groups, x, out), self._nbytes * len(groups.slots)
        return out, [Step(self._kernel, job, self._rows, nbytes, self._multiple)]

    def multiply(self, threads: KernelThreads, groups: Groups, x: torch.Tensor) -> torch.Tensor:
        """The products of all pairs, float32 [pairs, rows]; `x` is [pairs, columns] in any float dtype."""
        out, steps = self.product(groups, x.to(self.inputs).contiguous())
        threads.run(steps)
        return out

    def multiply_one(self, threads: KernelThreads, x: torch.Tensor) -> torch.Tensor:
        """The products of `x`, [tokens, columns], with the matrix of the first record, float32 [tokens, rows]."""
        return self.multiply(threads, Groups.of_one(len(x)), x)
