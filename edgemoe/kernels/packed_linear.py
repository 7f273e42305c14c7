"""Products with packed weights on any device, in the plain form: a few rows are widened, multiplied and dropped."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch.nn import functional as F

from edgemoe.formats.weight_format import WeightFormat

TILE_VALUES = 1 << 20
"""Weights that are widened at a time: 4 MB of float32, which a cache of the CPU holds."""


def packed_linear(
    x: torch.Tensor, kind: WeightFormat, views: Mapping[str, torch.Tensor], name: str, rows: int
) -> torch.Tensor:
    """x · Wᵀ in float32, [..., rows]; `x` is [..., columns] in any float dtype, W the matrix `name` in `views`.

    The reference for kernels that read packed weights.
    """
    tile = TILE_VALUES // x.shape[-1] // kind.row_multiple * kind.row_multiple
    return tiled_linear(x, rows, max(kind.row_multiple, tile), lambda *span: kind.rows(views, name, *span))


def tiled_linear(x: torch.Tensor, rows: int, tile: int, read: Callable[[int, int], torch.Tensor]) -> torch.Tensor:
    """As `packed_linear`, with `read(first, last)` giving at most `tile` rows of the matrix in a float dtype."""
    values = x.float()
    products = [F.linear(values, read(first, min(first + tile, rows)).float()) for first in range(0, rows, tile)]
    return products[0] if len(products) == 1 else torch.cat(products, dim=-1)
