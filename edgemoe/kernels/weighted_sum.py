"""The sum of the outputs of a token's experts, times their routing weights."""

from __future__ import annotations

import torch

from edgemoe.kernels.cpu.arrays import Job
from edgemoe.kernels.cpu.threads import KernelThreads


def weighted_sum(outputs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The reference: `outputs` is [tokens * top-k, hidden size], `weights` [tokens, top-k]; [tokens, hidden size]."""
    weighted = outputs.view(*weights.shape, -1) * weights.unsqueeze(-1)
    return weighted.sum(dim=1).to(outputs.dtype)


def fast_weighted_sum(threads: KernelThreads, outputs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """As `weighted_sum` on a CPU, by a kernel where there is one, which adds the experts in their order."""
    # Imported late: importing numba is slow.
    from edgemoe.kernels.cpu import row_kernels
    from edgemoe.kernels.cpu.program import Step

    kernel = {
        (torch.bfloat16, torch.bfloat16): row_kernels.weighted_sum_bf16,
        (torch.bfloat16, torch.float32): row_kernels.weighted_sum_bf16_by_f32,
        (torch.float32, torch.float32): row_kernels.weighted_sum_f32,
    }.get((outputs.dtype, weights.dtype))
    if kernel is None:
        return weighted_sum(outputs, weights)
    (tokens, top_k), columns = weights.shape, outputs.shape[-1]
    x, own, out = outputs.contiguous(), weights.contiguous(), outputs.new_empty(tokens, columns)
    step = columns * x.element_size()
    words = row_kernels.Words(x.data_ptr(), step, out.data_ptr(), columns, own.data_ptr(), option=top_k)
    job = Job(words, (x, own, out))
    threads.run([Step(kernel, job, tokens, x.nbytes, scratch_nbytes=4 * columns)])
    return out
