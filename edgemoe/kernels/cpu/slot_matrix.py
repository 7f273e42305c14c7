"""A matrix of plain floats at one place of records in memory, as the kernels read it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from edgemoe.kernels.cpu.arrays import Groups, Matrix
from edgemoe.kernels.cpu.threads import KernelThreads
from edgemoe.kernels.row_linear import BATCH_INVARIANT_TOKENS


class SlotMatrix:
    """A matrix [rows, columns], or stored transposed, in every record of some memory on the CPU."""

    max_tokens = BATCH_INVARIANT_TOKENS
    """Tokens up to which products are summed in one order: PyTorch's are faster beyond."""

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
        self._nbytes = self._rows * self._columns * dtype.itemsize
        self._memory = memory
        self._inputs = torch.float32
        self._transposed: Callable[..., None] | None = None
        if transposed:
            pool = memory.numpy().view(gemv_kernels.TRANSPOSED_UNITS[dtype])
            first = offset // dtype.itemsize
            self._transposed = partial(gemv_kernels.grouped_gemv_transposed, first, self._rows, pool)
            return
        kernel = gemv_kernels.row_kernel(dtype, self._columns)
        assert kernel is not None, f"there is no kernel for {dtype}"
        self._inputs, self._call = kernel.inputs, kernel.loop.call
        self._matrix = Matrix(memory.data_ptr() + offset, memory.stride(0), self._columns)

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
            return dtype in gemv_kernels.TRANSPOSED_UNITS
        return gemv_kernels.row_kernel(dtype, columns) is not None

    def multiply(self, threads: KernelThreads, groups: Groups, x: torch.Tensor) -> torch.Tensor:
        """The products of all pairs, float32 [pairs, rows].

        `x` is [pairs, columns] in any float dtype. The slots of `groups` must be pinned.
        """
        from edgemoe.kernels.cpu.gemv_kernels import results

        values, out = x.to(self._inputs).contiguous(), results(len(x), self._rows)
        threads.split(self._rows, self._bound(groups, values, out), nbytes=self._nbytes * len(groups.slots))
        return out

    def multiply_one(self, threads: KernelThreads, x: torch.Tensor) -> torch.Tensor:
        """The products of `x`, [tokens, columns], with the matrix of the first record, float32 [tokens, rows]."""
        return self.multiply(threads, Groups.of_one(len(x)), x)

    def _bound(self, groups: Groups, values: torch.Tensor, out: torch.Tensor) -> Callable[[int, int], None]:
        """What writes some rows of `out`, by the first one and the end."""
        if self._transposed is not None:
            return partial(self._transposed, *groups, values.numpy(), out.numpy())
        call, job = self._call, self._matrix.product(groups, values, out)
        return lambda first, last: call(job.address, 0, first, last)
