"""One weight matrix of every record in the slots of one size, as the kernels read it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from edgemoe.cache.record import Part, RecordLayout
from edgemoe.cache.slots import SlotRegion
from edgemoe.kernels.cpu.threads import KernelThreads

if TYPE_CHECKING:
    from edgemoe.kernels.cpu.gemv_kernels import Kernel


class SlotMatrix:
    """The part `name` of every record in `region`, a matrix [rows, columns] or, `transposed`, [columns, rows]."""

    def __init__(self, region: SlotRegion, layout: RecordLayout, name: str, transposed: bool) -> None:
        """`fits` must hold. Shares the region's memory, which must be on the CPU."""
        part = next(part for part in layout.parts if part.name == name)
        kernel = self._find_kernel(part, transposed)
        assert kernel is not None, f"there is no kernel for {part}"
        self.name = name
        self.max_tokens = kernel.max_tokens
        """Tokens per matrix up to which the kernel is faster than PyTorch's product."""
        self._kernel = kernel
        self._transposed = transposed
        self._rows, self._columns = part.shape[::-1] if transposed else part.shape
        self._nbytes = part.nbytes
        self._memory = region.memory.numpy().view(kernel.unit)
        self._offset = layout.part_offset(name) // np.dtype(kernel.unit).itemsize

    @classmethod
    def fits(cls, layout: RecordLayout, name: str, transposed: bool) -> bool:
        """Whether a kernel exists for this part's dtype, orientation and width."""
        return cls._find_kernel(next(part for part in layout.parts if part.name == name), transposed) is not None

    @staticmethod
    def _find_kernel(part: Part, transposed: bool) -> Kernel | None:
        # Imported late: importing numba is slow.
        from edgemoe.kernels.cpu import gemv_kernels

        return (
            gemv_kernels.column_kernel(part.dtype) if transposed else gemv_kernels.row_kernel(part.dtype, part.shape[1])
        )

    def multiply(self, threads: KernelThreads, slots: Any, starts: Any, x: torch.Tensor) -> torch.Tensor:
        """The products of all pairs, float32 [pairs, rows].

        `x` is [pairs, columns] in any float dtype. `slots` and `starts` are integer arrays of numpy: the pairs
        `starts[i]` ≤ p < `starts[i + 1]` are multiplied by the matrix in `slots[i]`, which must be pinned.
        """
        values = self._kernel.values(x)
        out = self._kernel.results(len(values), self._rows)
        extent = self._rows if self._transposed else self._columns

        def run(first: int, last: int) -> None:
            self._kernel.run(slots, self._offset, extent, self._memory, starts, values, out, first, last)

        threads.split(self._rows, run, nbytes=self._nbytes * len(slots))
        return torch.from_numpy(out)
