"""The formats that edgemoe makes of float weights. All are lossy: their values are near those of the checkpoint."""

from __future__ import annotations

import math

import torch

from edgemoe.formats.bnb_format import BnbFourBitFormat, BnbInt8Format
from edgemoe.formats.int_group_format import IntGroupFormat
from edgemoe.formats.weight_format import MakeableFormat

MADE = ("int8", "nf4", "fp4", "int4")
"""Their names."""
INT4_GROUP = 32
"""Most values that share a scale in int4."""
MIN_INT4_GROUP = 8
"""Rows that no larger group divides have one scale each."""


def made_format(name: str, columns: int) -> MakeableFormat:
    """The format called `name`, of `MADE`, for matrices with `columns` columns."""
    if name == "int8":
        return BnbInt8Format()
    if name == "int4":
        group = math.gcd(columns, INT4_GROUP)
        return IntGroupFormat(4, group if group >= MIN_INT4_GROUP else 0, torch.bfloat16)
    return BnbFourBitFormat(name, columns)
