"""PyTorch's products for few tokens on a CPU, where no kernel is: each token gets the bits that it has alone."""

from __future__ import annotations

import torch
from torch.nn import functional as F

BATCH_INVARIANT_TOKENS = 64
"""Tokens of a sequence in a pass up to which each of them gets the bits of a step of its own."""


def row_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x · weightᵀ, [tokens, rows], one row of `x`, [tokens, columns], at a time.

    PyTorch sums in another order for several rows than for one, so that the last bit may differ.
    """
    if len(x) == 1:
        return F.linear(x, weight)
    return torch.cat([F.linear(row, weight) for row in x.split(1)])


def few_on_cpu(x: torch.Tensor) -> bool:
    """Whether a pass with the tokens `x`, [tokens, columns], gives each of them the bits of a step of its own."""
    return x.device.type == "cpu" and len(x) <= BATCH_INVARIANT_TOKENS
