"""Small codes that several formats pack: 4-bit floats, and integers of a few bits in larger words."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch.nn import functional

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The values of a 4-bit float with two bits of exponent and one of mantissa (OCP Microscaling Formats, MXFP4)."""


@lru_cache(maxsize=64)
def table(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """`values` as a float32 tensor on `device`, made once."""
    return torch.tensor(values, dtype=torch.float32, device=device)


def nibbles(packed: torch.Tensor, *, low_first: bool = True) -> torch.Tensor:
    """The two 4-bit codes of each byte of `packed`, uint8 [..., n], one after the other: uint8 [..., 2 n]."""
    low, high = packed & 15, packed >> 4
    pair = (low, high) if low_first else (high, low)
    return torch.stack(pair, dim=-1).flatten(-2)


def e2m1(codes: torch.Tensor) -> torch.Tensor:
    """The values of 4-bit float codes, float32 of the same shape."""
    return table(E2M1, codes.device)[codes.long()]


def fields(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The unsigned fields of `bits` bits of int32 `words` [..., n], lowest first: int32 [..., n * 32 / bits]."""
    shifts = torch.arange(0, 32, bits, device=words.device, dtype=torch.int32)
    # The shift of a negative word keeps its sign, which the mask takes away.
    return ((words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(-2)


def packed_fields(values: torch.Tensor, bits: int) -> torch.Tensor:
    """The words int32 [..., n] of unsigned `values`, int64 [..., up to n * 32 / bits]: the opposite of `fields`."""
    per_word = 32 // bits
    padded = functional.pad(values, (0, -values.shape[-1] % per_word)).unflatten(-1, (-1, per_word))
    words = (padded << torch.arange(0, 32, bits, device=values.device)).sum(-1)
    # Words of 2^31 and more are negative numbers of 32 bits.
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def spread(scales: torch.Tensor, size: int, extent: int, dim: int) -> torch.Tensor:
    """`scales` with each entry of `dim` repeated `size` times, cut to `extent`: what belongs to each value."""
    return scales.repeat_interleave(size, dim=dim).narrow(dim, 0, extent)
