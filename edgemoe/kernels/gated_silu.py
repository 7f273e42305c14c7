"""The activation between the two matrices of an expert, by one kernel: in PyTorch it is six operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.activations import SiLUActivation

from edgemoe.kernels.cpu.arrays import Job
from edgemoe.kernels.cpu.threads import KernelThreads

ACTIVATION_DTYPES = (torch.bfloat16, torch.float32)
DEFAULT_GATE = "_default_apply_gate"
"""What transformers calls its own gate, for families that do not bring another one."""


def is_gated_silu(module: Any) -> bool:
    """Whether an experts module of transformers computes silu(gate) * up, gate being the first half of the products."""
    gated = module.has_gate and type(module)._apply_gate.__name__ == DEFAULT_GATE
    return gated and isinstance(module.act_fn, (nn.SiLU, SiLUActivation))


def gated_silu(threads: KernelThreads, products: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """silu(gate) * up, [pairs, columns] of `dtype`, one of `ACTIVATION_DTYPES`.

    `products` is float32 [pairs, 2 * columns], gate and up. Rounded to `dtype` wherever PyTorch's operations round.
    """
    # Imported late: importing numba is slow.
    from edgemoe.kernels.cpu import row_kernels

    pairs, both = products.shape
    out = torch.empty(pairs, both // 2, dtype=dtype)
    step = products.stride(0) * products.element_size()
    job = Job(row_kernels.Words(products.data_ptr(), step, out.data_ptr(), both // 2), (products, out))
    call = (row_kernels.gated_silu_bf16 if dtype is torch.bfloat16 else row_kernels.gated_silu_f32).call
    threads.split(pairs, lambda first, last: call(job.address, 0, first, last), nbytes=products.nbytes)
    return out
