"""A kernel that stores the tiles of a matrix, and its compilation for cards. Importing this needs Triton."""

# Triton reads the annotations of a kernel as part of it: only what is fixed when it is compiled has one.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch

from bench.support.format_samples import samples
from edgemoe.cache.record import RecordLayout
from edgemoe.formats.float_format import NAMES, FloatFormat
from edgemoe.formats.weight_format import WeightFormat
from edgemoe.kernels.triton.language import constexpr, tl, triton
from edgemoe.kernels.triton.tile_format import TileFormat, tile_format
from edgemoe.kernels.triton.tile_parts import rounded_to


def _copy(
    record,
    tables,
    order,
    out,
    WIDTH: constexpr,
    LOAD: constexpr,
    META: constexpr,
    ROWS: constexpr,
    BLOCK: constexpr,
):
    """Stores the rows `order` of a matrix, ROWS for each program, as float32 [rows, WIDTH]."""
    line = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.load(order + line)
    for first in range(0, WIDTH, BLOCK):
        tile = LOAD(record, tables, row, first, BLOCK, META)
        tl.store(out + line[:, None] * WIDTH + first + tl.arange(0, BLOCK)[None, :], tile)


def _round(values, out, NUMBER: constexpr, BLOCK: constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, rounded_to(tl.load(values + at), NUMBER))


copy = triton.jit(_copy)
round_values = triton.jit(_round)


def tiles(
    kind: WeightFormat, shape: tuple[int, int], before: int = 0, device: str = "cpu", *, transposed: bool = False
) -> tuple[RecordLayout, TileFormat]:
    """The layout of a record with the matrix `w`, `before` times 64 bytes behind its start, and how it is read."""
    stored = shape[::-1] if transposed else shape
    parts = [*FloatFormat(torch.float32).parts("before", (before, 16)), *kind.parts("w", stored)]
    layout = RecordLayout(parts)
    found = tile_format(kind, shape, layout.places("w"), torch.device(device), transposed=transposed)
    assert found is not None
    return layout, found


def compile_all(backend: str, architecture: int | str) -> None:
    """Compiles the kernel for a card, with every format of the samples and those of floats; raises what fails."""
    compiler = importlib.import_module("triton.compiler")
    target = importlib.import_module("triton.backends.compiler").GPUTarget(backend, architecture, 32)
    cases: dict[Any, TileFormat] = {}
    for sample in samples(1):
        found = tiles(sample.format, sample.shape)[1]
        cases[sample.name] = found
    for dtype in NAMES:
        for transposed in (False, True):
            cases[dtype, transposed] = tiles(FloatFormat(dtype), (24, 512), transposed=transposed)[1]
    for name, found in cases.items():
        table = "*i32" if found.tables.dtype == torch.int32 else "*fp32"
        constants = {"WIDTH": 512, "LOAD": found.load, "META": found.meta, "ROWS": 16, "BLOCK": 128}
        signature = {"record": "*u8", "tables": table, "order": "*i32", "out": "*fp32"}
        kinds = signature | dict.fromkeys(constants, "constexpr")
        source = compiler.ASTSource(fn=copy, signature=kinds, constexprs=constants)
        code = triton.compile(source, target=target).asm
        assert code["cubin" if backend == "cuda" else "hsaco"], name
    print(f"{len(cases)} kernels compiled")


if __name__ == "__main__":
    compile_all(sys.argv[1], int(sys.argv[2]) if sys.argv[2].isdigit() else sys.argv[2])
