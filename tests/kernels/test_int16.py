from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from bench.support.format_samples import same_bits
from edgemoe.formats.gguf_format import BLOCKS, GgufFormat
from edgemoe.formats.stacked_format import StackedFormat
from edgemoe.kernels.cpu.arrays import Groups
from edgemoe.kernels.cpu.packed.int16_codes import KINDS, codes_of
from edgemoe.kernels.cpu.packed.packed_matrix import Int16Kernel, PackedMatrix, packed_kernel
from edgemoe.kernels.cpu.threads import KernelThreads

SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
"""Where the fp16 of a block are, in bytes; at its beginning in the other types."""
ROWS, COLUMNS = 19, 768


@pytest.fixture
def threads() -> Iterator[KernelThreads]:
    kept = KernelThreads(2)
    yield kept
    kept.close()


def blocks(kind: str, seed: int, rows: int = ROWS, columns: int = COLUMNS) -> torch.Tensor:
    """Random codes with scales of a usual size, uint8 [rows, bytes]."""
    generator = torch.Generator().manual_seed(seed)
    count, nbytes = BLOCKS[kind]
    data = torch.randint(0, 256, (rows * columns // count, nbytes), generator=generator, dtype=torch.uint8)
    for at in SCALES.get(kind, (0,)):
        scales = (torch.rand(len(data), 1, generator=generator) * 0.02 - 0.01).half()
        data[:, at : at + 2] = scales.view(torch.uint8)
    return data.view(rows, -1)


def matrix_of(kind: str, *records: torch.Tensor) -> PackedMatrix:
    memory = torch.stack([record.flatten() for record in records])
    form, shape = GgufFormat(kind), (ROWS, COLUMNS)
    return PackedMatrix(form, shape, memory, {part.name: 0 for part in form.parts("", shape)})


def values(kind: str, record: torch.Tensor) -> torch.Tensor:
    (part,) = GgufFormat(kind).parts("", (len(record), COLUMNS))
    return GgufFormat(kind).dequantize({"w" + part.name: record}, "w").double()


def plain_rounding(x: torch.Tensor, unit: int) -> torch.Tensor:
    """What kernels multiply in the place of `x`, float64: whole multiples of 1/32767 of a unit's largest magnitude."""
    units = x.unflatten(-1, (-1, unit)).double()
    largest = units.abs().amax(-1, keepdim=True)
    rounded = (units / largest * 32767).round().nan_to_num(0.0) / 32767 * largest
    found: torch.Tensor = rounded.flatten(-2)
    return found


def uneven(tokens: int, seed: int) -> torch.Tensor:
    """Inputs of very different magnitudes, as those of down projections are."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, COLUMNS, generator=generator) * torch.randn(tokens, COLUMNS, generator=generator).exp()


@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_rounded_inputs_in_groups_of_any_size(kind: str, threads: KernelThreads) -> None:
    records = [blocks(kind, seed) for seed in range(3)]
    x = uneven(23, 1)
    found = matrix_of(kind, *records).multiply(threads, Groups(np.array([2, 0]), np.array([0, 4, 23])), x)
    rounded = plain_rounding(x, codes_of(kind).layout.unit)
    for slot, first, last in ((2, 0, 4), (0, 4, 23)):
        expected = rounded[first:last] @ values(kind, records[slot]).t()
        # A value in the middle between two integers may be rounded to the other one.
        assert (found[first:last] - expected).abs().max() < 1e-4 * expected.std()


@pytest.mark.parametrize("kind", KINDS)
def test_rounding_changes_less_than_a_tenth_of_what_bf16_does(kind: str, threads: KernelThreads) -> None:
    record, x = blocks(kind, 5), uneven(32, 2)
    exact = x.double() @ values(kind, record).t()
    error = (matrix_of(kind, record).multiply_one(threads, x) - exact).square().mean()
    usual = (x.bfloat16().double() @ values(kind, record).t() - exact).square().mean()
    assert error < usual / 100


@pytest.mark.parametrize("kind", KINDS)
def test_bits_do_not_depend_on_companions_or_threads(kind: str, threads: KernelThreads) -> None:
    matrix, x = matrix_of(kind, blocks(kind, 6)), uneven(21, 3)
    together = matrix.multiply_one(threads, x)
    single = KernelThreads(1)
    assert same_bits(together, torch.cat([matrix.multiply_one(threads, row[None]) for row in x]))
    assert same_bits(together, matrix.multiply_one(single, x))
    # Rows that are all one are rounded once.
    assert same_bits(matrix.multiply_one(threads, x[:1].expand(5, -1)), together[:1].expand(5, -1).contiguous())
    single.close()


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K"])
def test_what_is_infinite_or_no_number_stays_so_and_zeros_are_zeros(kind: str, threads: KernelThreads) -> None:
    x = uneven(4, 4)
    x[0, 700], x[1, 3], x[2], x[3] = float("inf"), float("nan"), 0.0, 1e-40
    found = matrix_of(kind, blocks(kind, 7)).multiply_one(threads, x)
    assert not found[:2].isfinite().any()
    assert (found[2] == 0).all()
    assert found[3].abs().max() < 1e-30


def rounded_token(kernel: Int16Kernel, x: torch.Tensor, threads: KernelThreads) -> torch.Tensor:
    out, step = kernel.rounded(x)
    threads.run([step])
    return out


def test_one_outlier_leaves_the_error_of_a_unit_below_a_fifth_of_bf16s(threads: KernelThreads) -> None:
    kernel = packed_kernel(GgufFormat("Q8_0"), 64)
    assert kernel is not None
    assert kernel.int16 is not None
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(200, 64, generator=generator)
    x[:, 17] = 1000 * (1 + torch.rand(200, generator=generator))
    token = rounded_token(kernel.int16, x, threads)
    codes, factor = token[:, :128].view(torch.int16).double(), token[:, 128:].view(torch.float32).double()
    error = (codes * factor - x.double()).square().sum()
    usual = (x.bfloat16().double() - x.double()).square().sum()
    assert error.sqrt() < usual.sqrt() / 5


def test_rows_that_are_no_whole_units_are_multiplied_as_floats(threads: KernelThreads) -> None:
    kernel = packed_kernel(GgufFormat("Q8_0"), 96)
    assert kernel is not None
    assert kernel.int16 is None
    record = blocks("Q8_0", 9, 4, 96)
    form = GgufFormat("Q8_0")
    (part,) = form.parts("", (4, 96))
    matrix = PackedMatrix.of_views(form, {part.name: record}, "", 96)
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(1))
    plain = form.dequantize({part.name: record}, "")
    assert torch.allclose(matrix.multiply_one(threads, x), x @ plain.t(), rtol=1e-5, atol=1e-5)


def test_matrices_one_above_the_other_share_what_is_rounded(threads: KernelThreads) -> None:
    form = StackedFormat((GgufFormat("Q4_K"), GgufFormat("Q4_K"), GgufFormat("Q6_K")), ROWS, False)
    kinds = ("Q4_K", "Q4_K", "Q6_K")
    records = [blocks(kind, 10 + at) for at, kind in enumerate(kinds)]
    (name,) = (part.name for part in GgufFormat("Q4_K").parts("", (ROWS, COLUMNS)))
    places, at = {}, 0
    for number, record in enumerate(records):
        places[f".{number}{name}"] = at
        at += record.numel()
    memory = torch.cat([record.flatten() for record in records])[None]
    matrix = PackedMatrix(form, (3 * ROWS, COLUMNS), memory, places)
    x = uneven(2, 11)
    _, steps = matrix.product(Groups.of_one(2), x)
    assert len(steps) == 3 + 2
    expected = torch.cat(
        [matrix_of(kind, each).multiply_one(threads, x) for kind, each in zip(kinds, records, strict=True)], 1
    )
    assert same_bits(matrix.multiply_one(threads, x), expected)
