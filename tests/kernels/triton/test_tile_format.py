from __future__ import annotations

import importlib
import os
import subprocess
import sys
from types import ModuleType

import numpy as np
import pytest
import torch

from bench.support.format_samples import Sample, _like, same_bits, samples
from edgemoe.formats.bnb_format import BnbFourBitFormat
from edgemoe.formats.float_format import NAMES, FloatFormat
from edgemoe.formats.fp8_format import Fp8Format
from edgemoe.formats.gptq_format import GptqFormat
from edgemoe.formats.int_group_format import IntGroupFormat
from edgemoe.formats.mxfp4_format import Mxfp4Format
from edgemoe.formats.nvfp4_format import Nvfp4Format
from edgemoe.formats.stacked_format import StackedFormat
from edgemoe.formats.weight_format import WeightFormat
from tests.support import ROOT

pytest.importorskip("triton", reason="triton is not installed: it comes with CUDA builds of torch")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
HEIGHT = 32
"""Rows of a tile."""
SAMPLES = {sample.name: sample for sample in samples(11)}
VARIANTS: dict[str, tuple[WeightFormat, tuple[int, int]]] = {
    "bnb, odd columns": (BnbFourBitFormat("nf4", 77), (10, 77)),
    "bnb, blocks across rows": (BnbFourBitFormat("fp4", 96), (10, 96)),
    "bnb, large blocks": (BnbFourBitFormat("nf4", 512, 256), (6, 512)),
    "int4, rows that end within a word": (IntGroupFormat(4, 0, torch.float16), (9, 77)),
    "int4, groups of 24, fp32": (IntGroupFormat(4, 24, torch.float32, True), (8, 120)),
    "int8, zero points, fp16": (IntGroupFormat(8, 64, torch.float16, True), (12, 192)),
    "int2": (IntGroupFormat(2, 32, torch.bfloat16, True), (16, 96)),
    "gptq of 8 bits": (GptqFormat(8, 32, torch.bfloat16), (12, 96)),
    "gptq of 2 bits": (GptqFormat(2, 0, torch.float16), (32, 96)),
    "awq, groups of 32, bf16, first layout": (GptqFormat(4, 32, torch.bfloat16, True, 1), (16, 96)),
    "e5m2": (Fp8Format((0, 0), torch.float8_e5m2, torch.bfloat16), (9, 77)),
    "e5m2, fp16": (Fp8Format((4, 32), torch.float8_e5m2, torch.float16), (9, 96)),
    "e4m3, scales that are powers": (Fp8Format((1, 64), torch.float8_e4m3fn, torch.float8_e8m0fnu), (9, 192)),
    "mxfp4 of 96 columns": (Mxfp4Format(), (5, 96)),
    "nvfp4 of 48 columns": (Nvfp4Format(True), (5, 48)),
}
"""Formats and shapes that are not among the samples."""


@pytest.fixture(scope="module")
def copies() -> ModuleType:
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("kernels run on a card, or in Triton's interpreter with TRITON_INTERPRET=1")
    return importlib.import_module("tests.support.tile_copies")


def found(
    copies: ModuleType, sample: Sample, block: int, order: torch.Tensor, *, transposed: bool = False
) -> torch.Tensor:
    """The rows `order` of a sample, by whole tiles of `block` columns, float32."""
    layout, tiles = copies.tiles(sample.format, sample.shape, 3, DEVICE, transposed=transposed)
    record = torch.full((layout.nbytes,), 255, dtype=torch.uint8, device=DEVICE)
    for name, view in layout.views(record).items():
        if name != "before":
            view.copy_(sample.views[name])
    padded = torch.nn.functional.pad(order, (0, -len(order) % HEIGHT), value=sample.shape[0]).int().to(DEVICE)
    width = -(-sample.shape[1] // block) * block
    out = torch.full((len(padded), width), torch.nan, device=DEVICE)
    constants = {"WIDTH": width, "LOAD": tiles.load, "META": tiles.meta, "ROWS": HEIGHT, "BLOCK": block}
    # The interpreter computes with numpy, which warns of values that overflow or are no numbers.
    with np.errstate(all="ignore"):
        copies.copy[len(padded) // HEIGHT,](record, tiles.tables, padded, out, **constants, enable_fp_fusion=False)
    assert (out[len(order) :] == 0).all()
    return out[: len(order)].cpu()


def holds(copies: ModuleType, sample: Sample, block: int, *, transposed: bool = False) -> None:
    """That tiles have the bits of the plain form, for rows in any order, some of them beyond the matrix."""
    rows, columns = sample.shape
    order = torch.randperm(rows + 5, generator=torch.Generator().manual_seed(block))
    views = {**sample.views, "w": sample.views["w"].t().contiguous()} if transposed else sample.views
    tiles = found(
        copies, Sample("", sample.format, views, sample.shape, sample.expected), block, order, transposed=transposed
    )
    plain = sample.format.dequantize(sample.views, "w").float()
    exist = order < rows
    assert same_bits(tiles[exist][:, :columns].contiguous(), plain[order[exist]].contiguous())
    assert (tiles[~exist] == 0).all()
    assert (tiles[:, columns:] == 0).all()


@pytest.mark.parametrize("name", SAMPLES)
def test_tiles_have_the_bits_of_the_plain_form(copies: ModuleType, name: str) -> None:
    for block in (32, 128, 256):
        holds(copies, SAMPLES[name], block)


def variant(kind: WeightFormat, shape: tuple[int, int], seed: int = 5) -> Sample:
    views = _like(kind, shape, torch.Generator().manual_seed(seed))
    if "w.shape" in views:
        views["w.shape"] = torch.tensor(shape)
    return Sample("", kind, views, shape, lambda: kind.dequantize(views, "w"))


@pytest.mark.parametrize("name", VARIANTS)
def test_tiles_of_uneven_shapes_and_rare_variants(copies: ModuleType, name: str) -> None:
    for block in (32, 64):
        holds(copies, variant(*VARIANTS[name]), block)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", NAMES)
def test_tiles_of_floats(copies: ModuleType, dtype: torch.dtype, transposed: bool) -> None:
    kind = FloatFormat(dtype)
    bits = torch.randint(0, 256, (13, 80 * dtype.itemsize), generator=torch.Generator().manual_seed(1))
    sample = Sample("", kind, {"w": bits.to(torch.uint8).view(dtype)}, (13, 80), lambda: torch.empty(0))
    for block in (32, 128):
        holds(copies, sample, block, transposed=transposed)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_8_bit_float(copies: ModuleType, dtype: torch.dtype) -> None:
    kind = Fp8Format((0, 0), dtype)
    values = torch.arange(256, dtype=torch.uint8).view(dtype).view(1, 256)
    views = {"w": values, "w.scale": torch.ones(1, 1)}
    holds(copies, Sample("", kind, views, (1, 256), lambda: torch.empty(0)), 256)


def test_every_exponent_of_mxfp4(copies: ModuleType) -> None:
    """The smallest one makes subnormal values; 255 stands for no number."""
    codes = torch.arange(16, dtype=torch.uint8)
    packed = (codes | (codes.flip(0) << 4)).expand(1, 255, 16).contiguous()
    views = {"w": packed, "w.scale": torch.arange(255, dtype=torch.uint8).view(1, 255)}
    holds(copies, Sample("", Mxfp4Format(), views, (1, 8160), lambda: torch.empty(0)), 256)


@pytest.mark.parametrize(("number", "dtype"), [(0, torch.float32), (1, torch.float16), (2, torch.bfloat16)])
def test_rounding_to_a_dtype(copies: ModuleType, number: int, dtype: torch.dtype) -> None:
    """Ties, values that become infinite or subnormal, and what is no number."""
    tie = torch.tensor(
        [1.00390625, 1.01171875, -1.00390625, 65519.0, 65520.0, 3.4e38, torch.inf, -torch.inf, 0.0, -0.0]
    )
    bits = torch.randint(-(1 << 31), 1 << 31, (244,), generator=torch.Generator().manual_seed(2))
    no_number = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    values = torch.cat([tie, bits.to(torch.int32).view(torch.float32), no_number])
    out = torch.empty_like(values, device=DEVICE)
    with np.errstate(over="ignore"):
        copies.round_values[1,](values.to(DEVICE), out, NUMBER=number, BLOCK=256)
    assert same_bits(out.cpu(), values.to(dtype).float())


def test_formats_without_a_loader(copies: ModuleType) -> None:
    """Matrices of several formats are read one by one; packed ones are never transposed."""
    tile_format = importlib.import_module("edgemoe.kernels.triton.tile_format").tile_format
    stacked = StackedFormat((Mxfp4Format(), Mxfp4Format()), 2)
    places = {"": 0, ".scale": 64, ".0": 0, ".1": 64, ".0.scale": 128, ".1.scale": 192}
    cpu = torch.device("cpu")
    assert tile_format(stacked, (4, 32), places, cpu) is None
    assert tile_format(Mxfp4Format(), (4, 32), places, cpu, transposed=True) is None
    assert tile_format(Mxfp4Format(), (4, 32), places, cpu) is not None
    assert tile_format(Fp8Format(scale_dtype=torch.int32), (4, 32), places, cpu) is None


@pytest.mark.parametrize(("backend", "architecture"), [("cuda", "80"), ("cuda", "90"), ("hip", "gfx1100")])
def test_loaders_compile_for_cards(backend: str, architecture: str) -> None:
    """Triton's interpreter accepts what its compiler refuses. Where it is chosen, kernels cannot be compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ended = subprocess.run(
        [sys.executable, "-m", "tests.support.tile_copies", backend, architecture],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert f"{len(SAMPLES) + 2 * len(NAMES)} kernels compiled" in ended.stdout
