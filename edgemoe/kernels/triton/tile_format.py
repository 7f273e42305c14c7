"""Which function loads tiles of a matrix on the device, for each weight format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from edgemoe.formats.bnb_format import BnbFourBitFormat, BnbInt8Format
from edgemoe.formats.float_format import FloatFormat
from edgemoe.formats.fp8_format import Fp8Format
from edgemoe.formats.gguf_blocks import IQ4
from edgemoe.formats.gguf_format import GgufFormat
from edgemoe.formats.gptq_format import GptqFormat
from edgemoe.formats.int_group_format import IntGroupFormat
from edgemoe.formats.mxfp4_format import Mxfp4Format
from edgemoe.formats.nvfp4_format import Nvfp4Format
from edgemoe.formats.weight_format import WeightFormat
from edgemoe.kernels.triton import float_tiles, gguf_grid_tiles, gguf_tiles, int_tiles
from edgemoe.kernels.triton.tile_parts import NUMBERS

GGUF = {
    "Q4_0": gguf_tiles.q4_0, "Q4_1": gguf_tiles.q4_1, "Q5_0": gguf_tiles.q5_0, "Q5_1": gguf_tiles.q5_1,
    "Q8_0": gguf_tiles.q8_0, "Q2_K": gguf_tiles.q2_k, "Q3_K": gguf_tiles.q3_k, "Q4_K": gguf_tiles.q4_k,
    "Q5_K": gguf_tiles.q5_k, "Q6_K": gguf_tiles.q6_k, "IQ4_NL": gguf_tiles.iq4_nl, "IQ4_XS": gguf_tiles.iq4_xs,
    "MXFP4": gguf_tiles.mxfp4_block,
}  # fmt: skip
"""The loaders of GGUF's types, but for those with a grid."""
GRIDS = {
    "IQ2_XXS": gguf_grid_tiles.iq2_xxs, "IQ2_XS": gguf_grid_tiles.iq2_xs, "IQ2_S": gguf_grid_tiles.iq2_s,
    "IQ3_XXS": gguf_grid_tiles.iq3_xxs, "IQ3_S": gguf_grid_tiles.iq3_s,
}  # fmt: skip
"""The loaders of those with a grid."""
PARTS = ("", ".zero", ".scale", ".group")
"""The suffixes of GPTQ's parts in the order of META."""
PLAIN = (torch.float32, torch.float16, torch.bfloat16)
"""The dtypes that products are rounded to."""


class TileFormat(NamedTuple):
    """How kernels read tiles of a matrix of a record.

    `load(record, tables, rows, first, BLOCK, META)`, for use in a kernel, gives float32 [R, BLOCK]: of the rows `rows`,
    int32 [R] ≥ 0 in any order, and of the columns first ≤ c < first + BLOCK. BLOCK is a power of two from 32 to 256,
    `first` a multiple of it and a column that exists. What lies beyond the matrix is 0, and is not read. `record`
    points to uint8, the start of the record, and is aligned to 16 bytes. Each value has the bits of the plain form,
    `WeightFormat.rows`; see `gguf_tiles` for what the compiler may change.
    """

    load: Any
    """A function of `triton.jit`, to be given to a kernel as a `constexpr`."""
    meta: tuple[Any, ...]
    """META: integers."""
    tables: torch.Tensor
    """float32 or int32 [n] on the device; one unused 0 where there are no tables."""


def tile_format(
    kind: WeightFormat,
    shape: tuple[int, int],
    places: Mapping[str, int],
    device: torch.device,
    *,
    transposed: bool = False,
) -> TileFormat | None:
    """How tiles of a matrix of `kind` are read; None where kernels cannot read it.

    `shape` is (outputs, inputs), the rows and columns of the tiles. `places` has the byte offset in the record of each
    part, by what follows the matrix' name. A `transposed` matrix is stored as [inputs, outputs]: float formats only.
    """
    none = torch.zeros(1, dtype=torch.float32, device=device)
    if isinstance(kind, FloatFormat):
        load = float_tiles.by_columns if transposed else float_tiles.by_rows
        return TileFormat(load, (*shape, places[""], NUMBERS[kind.dtype]), none)
    if transposed:
        return None
    if isinstance(kind, GgufFormat):
        meta = (*shape, places[""])
        if kind.kind in GRIDS:
            return TileFormat(GRIDS[kind.kind], meta, gguf_grid_tiles.grid_words(kind.kind, device))
        values = torch.tensor(IQ4, dtype=torch.float32, device=device) if kind.kind.startswith("IQ4") else none
        return TileFormat(GGUF[kind.kind], meta, values)
    found = _floats(kind, shape, places) or _integers(kind, shape, places)
    return None if found is None else TileFormat(*found, none)


def _floats(
    kind: WeightFormat, shape: tuple[int, int], places: Mapping[str, int]
) -> tuple[Any, tuple[Any, ...]] | None:
    """The loader and META of formats of small floats and of bitsandbytes' codes."""
    match kind:
        case Fp8Format() if kind.scale_dtype in NUMBERS and kind.dtype in NUMBERS:
            sides = (size or side for size, side in zip(kind.block, shape, strict=True))
            numbers = NUMBERS[kind.scale_dtype], NUMBERS[kind.dtype]
            return float_tiles.fp8, (*shape, places[""], places[".scale"], *sides, *numbers)
        case Mxfp4Format():
            return float_tiles.mxfp4, (*shape, places[""], places[".scale"])
        case Nvfp4Format():
            parts = (places[""], places[".scale"], places[".factor"])
            return float_tiles.nvfp4, (*shape, *parts, int(kind.divides))
        case BnbFourBitFormat():
            parts = (places[""], places[".absmax"], places[".quant_map"])
            return float_tiles.bnb_four_bit, (*shape, *parts, kind.block)
    return None


def _integers(
    kind: WeightFormat, shape: tuple[int, int], places: Mapping[str, int]
) -> tuple[Any, tuple[Any, ...]] | None:
    """The loader and META of formats of integers."""
    match kind:
        case BnbInt8Format():
            return int_tiles.bnb_int8, (*shape, places[""], places[".scb"])
        case IntGroupFormat() if kind.bits in (2, 4, 8) and kind.scale_dtype in PLAIN:
            parts = (places[""], places[".scale"], places.get(".zero", -1), places.get(".group", -1))
            return int_tiles.int_groups, (
                *shape, *parts, kind.bits, kind.group or shape[1], NUMBERS[kind.scale_dtype]
            )  # fmt: skip
        case GptqFormat() if kind.bits in (2, 4, 8) and kind.scale_dtype in PLAIN and (kind.bits == 4 or not kind.awq):
            found = tuple(places.get(part, -1) for part in PARTS)
            sizes = (kind.bits, kind.group or shape[1], kind.zero_offset, NUMBERS[kind.scale_dtype])
            return int_tiles.awq if kind.awq else int_tiles.gptq, (*shape, *found, *sizes)
    return None
