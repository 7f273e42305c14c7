"""`floor`: how close a cycle comes to its floor in 16 and 4 bit, and where the rest of its time goes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from bench.measurement import BaseSize, Measurement
from bench.speculation import spec_floor
from bench.support.checkpoints import FACTOR, SMALL_FACTOR
from bench.support.link_cells import Cell
from bench.support.packed_models import inflated_variants

NAME = "floor"
MOST = 1.3
BAR = f"time of a cycle <= {MOST:g}x max(bytes moved / link bandwidth, bytes read / memory bandwidth) in every cell"
CELLS = tuple(Cell(cache, gbps) for cache in ("25%", "50%") for gbps in (4.0, 16.0, None))


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """Formats, by the names of `inflated_variants`, and what `spec-floor` takes."""

    formats: tuple[str, ...] = ("bf16", "int4")
    factor: int = FACTOR
    cells: spec_floor.Size = replace(spec_floor.FULL, cells=CELLS)


FULL, SMALL = Size(), Size(small=True, formats=("int4",), factor=SMALL_FACTOR, cells=spec_floor.SMALL)


def run(size: Size = FULL) -> Measurement:
    """The default settings, one held-out question of every task in every cell. Decoding alone, warm."""
    variants = inflated_variants(size.factor)
    cells = []
    for name in size.formats:
        print(name, flush=True)
        cells += [{"format": name} | spec_floor.measure(cell, size.cells, variants[name]) for cell in size.cells.cells]
    worst = max(at["over_floor"] for at in cells)
    return Measurement(NAME, {"worst": round(worst, 2)}, BAR, worst <= MOST, {"cells": cells})
