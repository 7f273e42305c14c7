"""The activation between the two matrices of an expert, by one kernel: in PyTorch it is six operations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.activations import SiLUActivation

from edgemoe.kernels.cpu.arrays import Job

if TYPE_CHECKING:
    from edgemoe.kernels.cpu.program import Step

ACTIVATION_DTYPES = (torch.bfloat16, torch.float32)
DEFAULT_GATE = "_default_apply_gate"
"""What transformers calls its own gate, for families that do not bring another one."""


def is_gated_silu(module: Any) -> bool:
    """Whether an experts module of transformers computes silu(gate) * up, gate being the first half of the products."""
    gated = module.has_gate and type(module)._apply_gate.__name__ == DEFAULT_GATE
    return gated and isinstance(module.act_fn, (nn.SiLU, SiLUActivation))


def gated_silu(products: torch.Tensor, dtype: torch.dtype, out_dtype: torch.dtype) -> tuple[torch.Tensor, Step]:
    """Where silu(gate) * up will be, [pairs, columns] of `out_dtype`, and the step that writes it.

    `products` is float32 [pairs, 2 * columns], gate and up. `dtype` is one of `ACTIVATION_DTYPES`: values are rounded
    to it wherever PyTorch's operations round. `out_dtype` is the same, or float32.
    """
    # Imported late: importing numba is slow.
    from edgemoe.kernels.cpu import row_kernels
    from edgemoe.kernels.cpu.program import Step

    pairs, both = products.shape
    out = torch.empty(pairs, both // 2, dtype=out_dtype)
    step = products.stride(0) * products.element_size()
    job = Job(row_kernels.Words(products.data_ptr(), step, out.data_ptr(), both // 2), (products, out))
    kernel = {
        (torch.bfloat16, torch.bfloat16): row_kernels.gated_silu_bf16,
        (torch.bfloat16, torch.float32): row_kernels.gated_silu_rounded,
        (torch.float32, torch.float32): row_kernels.gated_silu_f32,
    }[dtype, out_dtype]
    return out, Step(kernel, job, pairs, products.nbytes)
