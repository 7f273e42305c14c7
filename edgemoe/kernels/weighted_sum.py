"""The sum of the outputs of a token's experts, times their routing weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from edgemoe.kernels.cpu.arrays import Job
from edgemoe.kernels.cpu.threads import KernelThreads

if TYPE_CHECKING:
    from edgemoe.kernels.cpu.program import Step


def weighted_sum(outputs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The reference: `outputs` is [tokens * top-k, hidden size], `weights` [tokens, top-k]; [tokens, hidden size]."""
    weighted = outputs.view(*weights.shape, -1) * weights.unsqueeze(-1)
    return weighted.sum(dim=1).to(outputs.dtype)


def weighted_sum_step(outputs: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, Step] | None:
    """Where the result of `weighted_sum` will be, and the step that writes it, which adds the experts in their order.

    On a CPU. `outputs` is contiguous, and may be written by earlier steps. None where there is no kernel.
    """
    # Imported late: importing numba is slow.
    from edgemoe.kernels.cpu import row_kernels
    from edgemoe.kernels.cpu.program import Step

    kernel = {
        (torch.bfloat16, torch.bfloat16): row_kernels.weighted_sum_bf16,
        (torch.bfloat16, torch.float32): row_kernels.weighted_sum_bf16_by_f32,
        (torch.float32, torch.float32): row_kernels.weighted_sum_f32,
    }.get((outputs.dtype, weights.dtype))
    if kernel is None:
        return None
    (tokens, top_k), columns = weights.shape, outputs.shape[-1]
    own, out = weights.contiguous(), outputs.new_empty(tokens, columns)
    step = columns * outputs.element_size()
    words = row_kernels.Words(outputs.data_ptr(), step, out.data_ptr(), columns, own.data_ptr(), option=top_k)
    job = Job(words, (outputs, own, out))
    return out, Step(kernel, job, tokens, outputs.nbytes, scratch_nbytes=4 * columns)


def fast_weighted_sum(threads: KernelThreads, outputs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """As `weighted_sum` on a CPU, by a kernel where there is one."""
    found = weighted_sum_step(outputs.contiguous(), weights)
    if found is None:
        return weighted_sum(outputs, weights)
    out, step = found
    threads.run([step])
    return out
