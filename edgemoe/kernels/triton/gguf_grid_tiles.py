"""Loaders of GGUF's types whose values come from a grid, four or eight at a time; see `gguf_parts`.

`tables` has the grid, a value a byte: int32 words, one or two an entry (see `grid_words`).
"""

# Triton reads the annotations of a kernel as part of it: only what is fixed when it is compiled has one.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from typing import Any

import torch

from edgemoe.kernels.triton.gguf_parts import blocks, by_half, half, octet, pieces, tile, units, word
from edgemoe.kernels.triton.language import constexpr, tl, triton
from edgemoe.kernels.triton.tile_parts import bytes_of, whole


def grid_words(kind: str, device: torch.device) -> torch.Tensor:
    """The grid of a type of GGUF, such as "IQ2_S", from the `gguf` package: int32 [entries * 1 or 2] on `device`.

    Each word holds four values as bytes, the first one in the lowest.
    """
    from gguf import quants

    own: Any = getattr(quants, kind)
    own.init_grid()
    values = torch.from_numpy(own.grid.reshape(-1).copy())
    return values.to(torch.uint8).view(torch.int32).to(device)


def _eights(tables, index):
    """The values of entries of eight: of `index` int32 [R, n, k], float32 [R, n, 8 k]."""
    pairs = tl.interleave(tl.load(tables + 2 * index), tl.load(tables + 2 * index + 1))
    return whole(bytes_of(pairs, 4), 0)


def _fours(tables, index):
    """The values of entries of four: of `index` int32 [R, n, k], float32 [R, n, 4 k]."""
    return whole(bytes_of(tl.load(tables + index), 4), 0)


def _all_signs(codes):
    """The eight signs that codes of seven bits stand for: an even number of them is negative."""
    parity = codes ^ (codes >> 4)
    parity = parity ^ (parity >> 2)
    parity = parity ^ (parity >> 1)
    return (codes & 127) | ((parity & 1) << 7)


def _signed(values, signs):
    """`values` [R, n, 8 k] > 0, negative where a bit of the bytes `signs`, int32 [R, n, k], is set.

    Triton subtracts a value from 0 to negate it, which gives 0 no sign: steps are multiplied afterwards.
    """
    bits = tl.interleave(signs, signs >> 4)
    bits = tl.interleave(bits, bits >> 2)
    bits = tl.interleave(bits, bits >> 1) & 1
    return tl.where(bits == 1, -values, values)


def _four_sevens(words):
    """The signs of the four lowest fields of seven bits of words [R, n]: int32 [R, n, 4]."""
    return all_signs((words[:, :, None] >> (7 * tl.arange(0, 4))[None, None, :]) & 127)


def _quarter_steps(start, block, at, BYTES: constexpr):
    """The steps of the values, float32 [R, n, 32], of codes of four bits in the byte `at`."""
    both, step = octet(start, block, at, BYTES), half(start, block, BYTES, 0)
    return by_half(step * (0.5 + whole(both & 15, 0)) * 0.25, step * (0.5 + whole(both >> 4, 0)) * 0.25)


def _iq2_xxs(record, tables, rows, first, BLOCK: constexpr, META: constexpr):
    start = record + META[2]
    block, part = blocks(rows, first, 256, BLOCK, META)
    index = bytes_of(units(start, block, 2 + part * 8, 4, 66, 2), 2)
    rest = word(start, block, 6 + part * 8, 66)
    steps = half(start, block, 66, 0) * (0.5 + whole((rest >> 28) & 15, 0)) * 0.25
    values = signed(eights(tables, index), four_sevens(rest))
    return tile(steps[:, :, None] * values, rows, first, BLOCK, META)


def _iq2_xs(record, tables, rows, first, BLOCK: constexpr, META: constexpr):
    start = record + META[2]
    block, part = blocks(rows, first, 256, BLOCK, META)
    codes = units(start, block, 2 + part * 8, 8, 74, 2)
    signs = all_signs((codes >> 9) & 127)
    steps = quarter_steps(start, block, 66 + part, 74)
    return tile(steps * signed(eights(tables, codes & 511), signs), rows, first, BLOCK, META)


def _iq2_s(record, tables, rows, first, BLOCK: constexpr, META: constexpr):
    start = record + META[2]
    block, part = blocks(rows, first, 256, BLOCK, META)
    low = pieces(start, block, 2 + part * 4, part * 0, 4, 255, 82, 2)
    high = (octet(start, block, 66 + part, 82)[:, :, None] >> (2 * tl.arange(0, 4))[None, None, :]) & 3
    signs = pieces(start, block, 34 + part * 4, part * 0, 4, 255, 82, 2)
    steps = quarter_steps(start, block, 74 + part, 82)
    return tile(steps * signed(eights(tables, low | (high << 8)), signs), rows, first, BLOCK, META)


def _iq3_xxs(record, tables, rows, first, BLOCK: constexpr, META: constexpr):
    start = record + META[2]
    block, part = blocks(rows, first, 256, BLOCK, META)
    index = pieces(start, block, 2 + part * 8, part * 0, 8, 255, 98, 2)
    rest = word(start, block, 66 + part * 4, 98)
    steps = half(start, block, 98, 0) * (0.5 + whole((rest >> 28) & 15, 0)) * 0.5
    values = signed(fours(tables, index), four_sevens(rest))
    return tile(steps[:, :, None] * values, rows, first, BLOCK, META)


def _iq3_s(record, tables, rows, first, BLOCK: constexpr, META: constexpr):
    start = record + META[2]
    block, part = blocks(rows, first, 256, BLOCK, META)
    low = pieces(start, block, 2 + part * 8, part * 0, 8, 255, 110, 2)
    high = (octet(start, block, 66 + part, 110)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    signs = pieces(start, block, 74 + part * 4, part * 0, 4, 255, 110, 2)
    codes = (octet(start, block, 106 + part // 2, 110) >> (part % 2 * 4)) & 15
    steps = half(start, block, 110, 0) * whole(1 + 2 * codes, 0)
    values = signed(fours(tables, low | (high << 8)), signs)
    return tile(steps[:, :, None] * values, rows, first, BLOCK, META)


eights = triton.jit(_eights)
fours = triton.jit(_fours)
all_signs = triton.jit(_all_signs)
signed = triton.jit(_signed)
four_sevens = triton.jit(_four_sevens)
quarter_steps = triton.jit(_quarter_steps)
iq2_xxs = triton.jit(_iq2_xxs)
iq2_xs = triton.jit(_iq2_xs)
iq2_s = triton.jit(_iq2_s)
iq3_xxs = triton.jit(_iq3_xxs)
iq3_s = triton.jit(_iq3_s)
