"""The program of one token's experts, which is made once for a layer.

The weights that stream by leave the caches of the CPU neither to Python nor to PyTorch, so that making it takes long.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from edgemoe.kernels.cpu.arrays import Groups
from edgemoe.kernels.cpu.threads import KernelThreads
from edgemoe.kernels.gated_silu import gated_silu
from edgemoe.kernels.rows import scattered
from edgemoe.kernels.weighted_sum import weighted_sum_step

if TYPE_CHECKING:
    from edgemoe.kernels.cpu.packed.packed_matrix import PackedMatrix
    from edgemoe.kernels.cpu.program import Program, Step
    from edgemoe.kernels.cpu.slot_matrix import SlotMatrix


def gated_steps(
    up: SlotMatrix | PackedMatrix,
    down: SlotMatrix | PackedMatrix,
    groups: Groups,
    x: torch.Tensor,
    rows: Sequence[int],
    outputs: torch.Tensor,
) -> list[Step]:
    """The steps of gated experts of the matrices `up` and `down`, in the slots of `groups`.

    From `x`, [pairs, hidden size] of the dtype that `up` multiplies, to the `rows` of `outputs`, one for each pair.
    """
    products, multiplying = up.product(groups, x)
    inner, activation = gated_silu(products, outputs.dtype, down.inputs)
    outer, again = down.product(groups, inner)
    return [*multiplying, activation, *again, *scattered(outer, rows, outputs)]


def steps_of_one(
    up: SlotMatrix | PackedMatrix,
    down: SlotMatrix | PackedMatrix,
    x: torch.Tensor,
    weights: torch.Tensor,
    slots: np.ndarray,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, list[Step]] | None:
    """Where the sum of one token's experts in `slots`, int64 [top-k], times their `weights`, [1, top-k], will be.

    That is [1, hidden size] of `dtype`. Gives the steps that write it as well, or None without a kernel for the sum.
    `x` is the hidden state, [1, hidden size] of the dtype that `up` multiplies.
    """
    top_k = weights.shape[-1]
    outputs = torch.empty(top_k, x.shape[-1], dtype=dtype)
    summing = weighted_sum_step(outputs, weights)
    if summing is None:
        return None
    summed, step = summing
    each = Groups(slots, np.arange(top_k + 1))
    return summed, [*gated_steps(up, down, each, x.expand(top_k, -1), range(top_k), outputs), step]


class PreparedExperts:
    """The steps of `FastExperts` for one token, from its hidden state to the weighted sum, in memory of their own."""

    def __init__(
        self, program: Program, slots: np.ndarray, inputs: tuple[torch.Tensor, torch.Tensor], summed: torch.Tensor
    ) -> None:
        """`program` reads `slots`, int64 [top-k], and the `inputs`, hidden and weights, and writes `summed`."""
        self._program = program
        self._slots = slots
        self._hidden, self._weights = inputs
        self._summed = summed

    @classmethod
    def of(
        cls,
        up: SlotMatrix | PackedMatrix,
        down: SlotMatrix | PackedMatrix,
        threads: KernelThreads,
        hidden: torch.Tensor,
        weights: torch.Tensor,
    ) -> PreparedExperts | None:
        """For experts of the matrices `up` and `down`, and inputs like `hidden`, [1, hidden size], and `weights`.

        These are [1, top-k]. None where there is no kernel for their sum.
        """
        top_k, columns = weights.shape[-1], hidden.shape[-1]
        # Later passes may write to them in another mode than this one's.
        with torch.inference_mode(False):
            own = torch.empty(1, columns, dtype=up.inputs), torch.empty(1, top_k, dtype=weights.dtype)
            slots = np.zeros(top_k, np.int64)
            found = steps_of_one(up, down, *own, slots, hidden.dtype)
        if found is None:
            return None
        summed, steps = found
        return cls(threads.program(steps), slots, own, summed)

    def run(self, hidden: torch.Tensor, weights: torch.Tensor, slots: Sequence[int]) -> torch.Tensor:
        """The weighted sum of the experts in `slots`, [1, hidden size], in the order of their `weights`. Pinned."""
        self._slots[:] = slots
        self._hidden.copy_(hidden)
        self._weights.copy_(weights)
        self._program.run()
        return self._summed.clone()
