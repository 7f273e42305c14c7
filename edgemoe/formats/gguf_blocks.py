"""What the blocks of GGUF's types mean: bytes uint8 [blocks, bytes of a block] to float32 [blocks, values of a block].

The types and their layouts are ggml's (`ggml-common.h`); the tables of the IQ types come from the `gguf` package. The
order of operations is the one of ggml, so that every value has the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from edgemoe.formats.codes import table

Blocks = torch.Tensor
IQ4 = (-127.0, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The values of four bits in IQ4_NL and IQ4_XS."""
MXFP4 = (0.0, 1, 2, 3, 4, 6, 8, 12, 0.0, -1, -2, -3, -4, -6, -8, -12)
"""The values of four bits in MXFP4, doubled to be whole; ggml has no negative zero."""
MXFP4_BIAS = 128
"""Of the exponents, for values that are doubled."""


def _half(blocks: Blocks, at: int) -> torch.Tensor:
    """The fp16 at byte `at`, float32 [blocks, 1]."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _shifted(packed: torch.Tensor, shifts: range, mask: int) -> torch.Tensor:
    """Fields of `packed`, uint8 [blocks, groups, n]: all of the lowest bits of a group come first, then the next.

    uint8 [blocks, groups, shifts, n].
    """
    amounts = torch.tensor(list(shifts), dtype=torch.uint8, device=packed.device).view(-1, 1)
    return (packed.unsqueeze(-2) >> amounts) & mask


def _bits(packed: torch.Tensor) -> torch.Tensor:
    """The bits of bytes [..., n], lowest first, uint8 [..., n, 8]."""
    return (packed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1


def _words(blocks: Blocks, first: int, last: int, nbytes: int) -> torch.Tensor:
    """Unsigned words of `nbytes` bytes, int64 [blocks, words]."""
    found = blocks[:, first:last].unflatten(1, (-1, nbytes)).long()
    shifts = torch.arange(0, 8 * nbytes, 8, device=blocks.device)
    words: torch.Tensor = (found << shifts).sum(-1)
    return words


def _halves(blocks: Blocks, at: int) -> torch.Tensor:
    """The 32 values of 16 bytes from `at` on: the low halves, then the high ones."""
    return _shifted(blocks[:, None, at : at + 16], range(0, 8, 4), 15).flatten(1)


# --- one scale for 32 values ---------------------------------------------------------------------------


def _q4_0(blocks: Blocks) -> torch.Tensor:
    return _half(blocks, 0) * (_halves(blocks, 2).float() - 8)


def _q4_1(blocks: Blocks) -> torch.Tensor:
    return _half(blocks, 0) * _halves(blocks, 4).float() + _half(blocks, 2)


def _q5(blocks: Blocks, at: int) -> torch.Tensor:
    """Values of five bits, the highest of which lie apart in four bytes from `at` on."""
    high = _bits(blocks[:, at : at + 4]).flatten(1)
    return (_halves(blocks, at + 4) | (high << 4)).float()


def _q5_0(blocks: Blocks) -> torch.Tensor:
    return _half(blocks, 0) * (_q5(blocks, 2) - 16)


def _q5_1(blocks: Blocks) -> torch.Tensor:
    return _half(blocks, 0) * _q5(blocks, 4) + _half(blocks, 2)


def _q8_0(blocks: Blocks) -> torch.Tensor:
    return _half(blocks, 0) * blocks[:, 2:34].view(torch.int8).float()


def _iq4_nl(blocks: Blocks) -> torch.Tensor:
    return _half(blocks, 0) * table(IQ4, blocks.device)[_halves(blocks, 2).long()]


def _mxfp4(blocks: Blocks) -> torch.Tensor:
    doubled = table(MXFP4, blocks.device)[_halves(blocks, 1).long()]
    # The smallest exponents are subnormal: a power of two that is multiplied twice is exact.
    exponents = blocks[:, :1].int() - MXFP4_BIAS
    return torch.ldexp(torch.ldexp(doubled, exponents // 2), exponents - exponents // 2)


# --- 256 values with scales of their own for every 16 or 32 ----------------------------------------------


def _q2_k(blocks: Blocks) -> torch.Tensor:
    scales, packed = blocks[:, :16], blocks[:, 16:80]
    steps = (_half(blocks, 80) * (scales & 15).float()).unsqueeze(-1)
    lowest = (_half(blocks, 82) * (scales >> 4).float()).unsqueeze(-1)
    values = _shifted(packed.unflatten(1, (2, 32)), range(0, 8, 2), 3).reshape(-1, 16, 16).float()
    return (steps * values - lowest).flatten(1)


def _q3_k(blocks: Blocks) -> torch.Tensor:
    packed = blocks[:, 96:108]
    low = _shifted(packed[:, None, :8], range(0, 8, 4), 15).flatten(1)
    high = _shifted(packed[:, None, 8:], range(0, 8, 2), 3).flatten(1)
    scales = (low | (high << 4)).float() - 32
    values = _shifted(blocks[:, 32:96].unflatten(1, (2, 32)), range(0, 8, 2), 3).reshape(-1, 16, 16).float()
    present = _shifted(blocks[:, None, :32], range(8), 1).reshape(-1, 16, 16).float()
    return ((_half(blocks, 108) * scales).unsqueeze(-1) * (values - 4 * (1 - present))).flatten(1)


def _six_bit_scales(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight scales and eight minima of 12 bytes, float32 [blocks, 8] each."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat([first & 63, (third & 15) | ((first >> 6) << 4)], dim=1)
    minima = torch.cat([second & 63, (third >> 4) | ((second >> 6) << 4)], dim=1)
    return scales.float(), minima.float()


def _q4_k(blocks: Blocks) -> torch.Tensor:
    values = _shifted(blocks[:, 16:144].unflatten(1, (4, 32)), range(0, 8, 4), 15).reshape(-1, 8, 32)
    return _with_minima(blocks, values)


def _q5_k(blocks: Blocks) -> torch.Tensor:
    low = _shifted(blocks[:, 48:176].unflatten(1, (4, 32)), range(0, 8, 4), 15).reshape(-1, 8, 32)
    high = _shifted(blocks[:, None, 16:48], range(8), 1).reshape(-1, 8, 32)
    return _with_minima(blocks, low | (high << 4))


def _with_minima(blocks: Blocks, values: torch.Tensor) -> torch.Tensor:
    """`values` [blocks, 8, 32] with the scales and minima of Q4_K and Q5_K."""
    scales, minima = _six_bit_scales(blocks[:, 4:16])
    steps, lowest = _half(blocks, 0) * scales, _half(blocks, 2) * minima
    return (steps.unsqueeze(-1) * values.float() - lowest.unsqueeze(-1)).flatten(1)


def _q6_k(blocks: Blocks) -> torch.Tensor:
    low = _shifted(blocks[:, :128].unflatten(1, (2, 64)), range(0, 8, 4), 15).reshape(-1, 8, 32)
    high = _shifted(blocks[:, 128:192].unflatten(1, (2, 32)), range(0, 8, 2), 3).reshape(-1, 8, 32)
    values = (low | (high << 4)).float() - 32
    steps = _half(blocks, 208) * blocks[:, 192:208].view(torch.int8).float()
    return (steps.unsqueeze(-1) * values.reshape(-1, 16, 16)).flatten(1)


def _iq4_xs(blocks: Blocks) -> torch.Tensor:
    low = _shifted(blocks[:, 4:8].unsqueeze(-1), range(0, 8, 4), 15).flatten(1)
    shifts = torch.arange(0, 16, 2, device=blocks.device)
    high = (_words(blocks, 2, 4, 2) >> shifts) & 3
    steps = _half(blocks, 0) * ((low | (high << 4).to(torch.uint8)).float() - 32)
    codes = _shifted(blocks[:, 8:].unflatten(1, (8, 16)), range(0, 8, 4), 15).reshape(-1, 8, 32)
    return (steps.unsqueeze(-1) * table(IQ4, blocks.device)[codes.long()]).flatten(1)


# --- values that come from tables, eight or four at a time ------------------------------------------------


@lru_cache(maxsize=16)
def _grid(name: str, device: torch.device) -> torch.Tensor:
    """The table of an IQ type, float32 [entries, 4 or 8]."""
    from gguf import quants

    kind: Any = getattr(quants, name)
    kind.init_grid()
    return torch.from_numpy(kind.grid.reshape(kind.grid_shape).copy()).to(device)


@lru_cache(maxsize=4)
def _sign_bytes(device: torch.device) -> torch.Tensor:
    """The eight signs that seven bits stand for: an even number of them is negative."""
    from gguf import quants

    return torch.tensor(list(quants.IQ2_XXS.ksigns), dtype=torch.uint8, device=device)


def _signs(packed: torch.Tensor) -> torch.Tensor:
    """1 or -1 for each bit of bytes [..., n], float32 [..., n, 8]."""
    return 1 - 2 * _bits(packed).float()


def _packed_signs(codes: torch.Tensor) -> torch.Tensor:
    """Signs of codes of seven bits [..., n], float32 [..., n, 8]."""
    return _signs(_sign_bytes(codes.device)[codes])


def _four_sevens(words: torch.Tensor) -> torch.Tensor:
    """The four lowest fields of seven bits of each word [..., n], int64 [..., n, 4]."""
    return (words.unsqueeze(-1) >> torch.arange(0, 28, 7, device=words.device)) & 127


def _of_grid(name: str, index: torch.Tensor, signs: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Entries of a table with signs, float32 [blocks, groups, n]; `steps` is [blocks, groups]."""
    values = _grid(name, index.device)[index.long()]
    scaled = steps[..., None] * values.reshape(*steps.shape, -1)
    return (scaled * signs.reshape(scaled.shape)).flatten(1)


def _iq2_xxs(blocks: Blocks) -> torch.Tensor:
    words = _words(blocks, 2, 66, 4).unflatten(1, (8, 2))
    steps = _half(blocks, 0) * (0.5 + (words[..., 1] >> 28).float()) * 0.25
    index = blocks[:, 2:66].unflatten(1, (8, 8))[..., :4]
    return _of_grid("IQ2_XXS", index, _packed_signs(_four_sevens(words[..., 1])), steps)


def _iq2_xs(blocks: Blocks) -> torch.Tensor:
    words = _words(blocks, 2, 66, 2)
    return _of_grid("IQ2_XS", words & 511, _packed_signs(words >> 9), _quarter_steps(blocks, 66))


def _quarter_steps(blocks: Blocks, at: int) -> torch.Tensor:
    """A step for every 16 values, from 16 codes of four bits in eight bytes from `at` on."""
    codes = _shifted(blocks[:, at : at + 8].unsqueeze(-1), range(0, 8, 4), 15).flatten(1)
    return _half(blocks, 0) * (0.5 + codes.float()) * 0.25


def _iq2_s(blocks: Blocks) -> torch.Tensor:
    high = _shifted(blocks[:, 66:74].unsqueeze(-1), range(0, 8, 2), 3).flatten(1)
    index = blocks[:, 2:34].int() | (high.int() << 8)
    return _of_grid("IQ2_S", index, _signs(blocks[:, 34:66]), _quarter_steps(blocks, 74))


def _iq3_xxs(blocks: Blocks) -> torch.Tensor:
    words = _words(blocks, 66, 98, 4)
    steps = _half(blocks, 0) * (0.5 + (words >> 28).float()) * 0.5
    return _of_grid("IQ3_XXS", blocks[:, 2:66], _packed_signs(_four_sevens(words)), steps)


def _iq3_s(blocks: Blocks) -> torch.Tensor:
    codes = _shifted(blocks[:, 106:110].unsqueeze(-1), range(0, 8, 4), 15).flatten(1)
    steps = _half(blocks, 0) * (1 + 2 * codes.int()).float()
    index = blocks[:, 2:66].int() | (_bits(blocks[:, 66:74]).flatten(1).int() << 8)
    return _of_grid("IQ3_S", index, _signs(blocks[:, 74:106]), steps)


VALUES: dict[str, Callable[[Blocks], torch.Tensor]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0,
    "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl, "IQ4_XS": _iq4_xs, "IQ3_S": _iq3_s, "IQ3_XXS": _iq3_xxs,
    "IQ2_XXS": _iq2_xxs, "IQ2_XS": _iq2_xs, "IQ2_S": _iq2_s, "MXFP4": _mxfp4,
}  # fmt: skip
"""The function of each packed type."""
