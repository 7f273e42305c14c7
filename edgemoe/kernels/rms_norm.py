"""RMS norms for few tokens by one kernel: a model of 48 layers has two hundred, of seven operations in PyTorch each."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn

from edgemoe.errors import is_device_or_memory_error
from edgemoe.kernels.cpu.arrays import Job

if TYPE_CHECKING:
    from edgemoe.cache.compiled import Native
    from edgemoe.kernels.cpu.program import Step

MAX_VALUES = 1 << 18
"""Values of an input up to which one thread is faster than PyTorch's operations on several."""
PROBED_ROWS = 5
MOST_DIFFERENT = 0.02
"""Of the probed bf16 values, by a last bit: another way to round changes a fifth of them."""


_ATTRIBUTE = "edgemoe_norm"


class NormArithmetic(NamedTuple):
    """What families do with the weight."""

    weight: torch.Tensor
    """float32 [columns]."""
    rounds: bool
    """Whether the quotient is rounded to the model's dtype before it is multiplied."""
    epsilon: int
    """The bits of a float32."""


def install_rms_norm(model: nn.Module) -> None:
    """Replaces the forward of every RMS norm of `model`, whose weights must stay as they are.

    A module is one by its name, and only where a kernel gives what its forward gives on random values.
    """
    for module in model.modules():
        weight, epsilon = getattr(module, "weight", None), _epsilon(module)
        if "RMSNorm" not in type(module).__name__ or weight is None or epsilon is None:
            continue
        if weight.dim() == 1 and weight.device.type == "cpu" and weight.dtype in (torch.bfloat16, torch.float32):
            for arithmetic in _arithmetics(weight, epsilon):
                forward = _forward(module.forward, arithmetic, weight.dtype)
                if _agrees(module, forward):
                    module.forward = types.MethodType(forward, module)
                    vars(module)[_ATTRIBUTE] = arithmetic
                    break


def arithmetic_of(norm: nn.Module) -> NormArithmetic | None:
    """What `norm` computes; None where `install_rms_norm` has found no kernel."""
    found: NormArithmetic | None = vars(norm).get(_ATTRIBUTE)
    return found


def norm_step(arithmetic: NormArithmetic, x: torch.Tensor, out: torch.Tensor) -> Step:
    """The step that writes the norms of the rows of `x` to `out`: both contiguous, bf16 or float32, [rows, columns]."""
    # Imported late: importing numba is slow.
    from edgemoe.kernels.cpu.program import Step

    return Step(_kernel(x.dtype), _job(arithmetic, x, out), len(x), x.nbytes)


def _kernel(dtype: torch.dtype) -> Native:
    from edgemoe.kernels.cpu import row_kernels

    return row_kernels.rms_norm_bf16 if dtype is torch.bfloat16 else row_kernels.rms_norm_f32


def _job(arithmetic: NormArithmetic, x: torch.Tensor, out: torch.Tensor) -> Job:
    """What the kernel reads for the rows of `x`, contiguous: words in the order of `row_kernels.Words`."""
    (weight, rounds, epsilon), columns = arithmetic, x.shape[-1]
    step = columns * x.element_size()
    words = x.data_ptr(), step, out.data_ptr(), columns, weight.data_ptr(), epsilon, int(rounds)
    return Job(words, (x, out, weight))


def _epsilon(module: nn.Module) -> float | None:
    found = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return float(found) if isinstance(found, (int, float)) else None


def _arithmetics(weight: torch.Tensor, epsilon: float) -> Iterator[NormArithmetic]:
    single, bits = weight.detach().float(), int(np.float32(epsilon).view(np.uint32))
    yield NormArithmetic(single, True, bits)
    yield NormArithmetic(single, False, bits)
    yield NormArithmetic(1 + single, False, bits)


def _forward(
    other: Callable[..., torch.Tensor], arithmetic: NormArithmetic, dtype: torch.dtype
) -> Callable[..., torch.Tensor]:
    run, columns = _kernel(dtype).call, len(arithmetic.weight)

    def forward(module: nn.Module, hidden_states: torch.Tensor, *others: Any, **named: Any) -> torch.Tensor:
        known = hidden_states.dtype is dtype and hidden_states.shape[-1] == columns and not others and not named
        count = hidden_states.numel()
        # A pass whose tokens have the bits of single steps has one of PyTorch's threads, however large it is.
        few = count > 0 and (count <= MAX_VALUES or torch.get_num_threads() == 1)
        if not known or not few or hidden_states.requires_grad:
            return other(hidden_states, *others, **named)
        x = hidden_states.contiguous()
        out = torch.empty_like(x)
        job = _job(arithmetic, x, out)
        run(job.address, 0, 0, count // columns)
        return out

    return forward


def _agrees(module: nn.Module, forward: Callable[..., torch.Tensor]) -> bool:
    """Whether both give the same values but for the last bits of a few."""
    weight: Any = module.weight
    values = torch.randn(PROBED_ROWS, len(weight), generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    with torch.inference_mode():
        try:
            expected, found = module(values), forward(module, values)
        except Exception as error:
            if is_device_or_memory_error(error):
                raise
            # It wants more than values, as gated norms do.
            return False
    if expected.dtype is not found.dtype or expected.shape != found.shape:
        return False
    differ = (expected != found).float().mean()
    close = torch.allclose(expected.float(), found.float(), rtol=1e-2 if weight.dtype is torch.bfloat16 else 1e-5)
    return close and (weight.dtype is torch.float32 or float(differ) < MOST_DIFFERENT)
