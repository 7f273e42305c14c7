"""Products with packed weights on any device, in the plain form: a few rows are widened, multiplied and dropped."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch.nn import functional as F

from edgemoe.formats.weight_format import WeightFormat
from edgemoe.kernels.row_linear import row_linear

TILE_VALUES = 1 << 20
"""Weights that are widened at a time: 4 MB of float32, which a cache of the CPU holds."""


def packed_linear(
    x: torch.Tensor,
    kind: WeightFormat,
    views: Mapping[str, torch.Tensor],
    name: str,
    rows: int,
    *,
    row_by_row: bool = False,
) -> torch.Tensor:
    """x · Wᵀ in float32, [tokens, rows]; `x` is [tokens, columns] in any float dtype, W the matrix `name` in `views`.

    The reference for kernels that read packed weights. With `row_by_row` a token's bits are those of it alone.
    """
    tile = TILE_VALUES // x.shape[-1] // kind.row_multiple * kind.row_multiple
    linear = row_linear if row_by_row else F.linear
    return tiled_linear(x, rows, max(kind.row_multiple, tile), lambda *span: kind.rows(views, name, *span), linear)


def tiled_linear(
    x: torch.Tensor,
    rows: int,
    tile: int,
    read: Callable[[int, int], torch.Tensor],
    linear: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = F.linear,
) -> torch.Tensor:
    """As `packed_linear`, with `read(first, last)` giving at most `tile` rows of the matrix in a float dtype."""
    values = x.float()
    products = [linear(values, read(first, min(first + tile, rows)).float()) for first in range(0, rows, tile)]
    return products[0] if len(products) == 1 else torch.cat(products, dim=-1)
