"""The CPU kernels against float64, in every layout that they support."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from edgemoe.kernels.cpu import gemv_kernels
from edgemoe.kernels.cpu.arrays import Groups, Matrix
from edgemoe.kernels.cpu.dot_block import PairsOfBf16
from edgemoe.kernels.cpu.gemv_kernels import RowKernel
from edgemoe.kernels.cpu.slot_matrix import SlotMatrix
from edgemoe.kernels.cpu.threads import KernelThreads

SLOTS, ROWS, COLUMNS, TOKENS, PADDING = 5, 7, 160, 4, 32
CHOSEN = np.array([3, 0, 4, 1, 2])
STARTS = np.array([0, 2, 2, 5, 6, 16])
"""Slot 3 has two pairs, slot 0 none, slot 4 three, slot 1 one and slot 2 ten: blocks of every size."""
OF_TOKENS = np.array([1, 3, 0, 0, 2, 3, 0, 1, 2, 3, 3, 2, 1, 0, 2, 1])
ROW_KERNELS = {
    "bf16": (torch.bfloat16, RowKernel(gemv_kernels.grouped_gemv_bf16, torch.float32)),
    "fp16": (torch.float16, RowKernel(gemv_kernels.grouped_gemv_f16, torch.float32)),
    "fp32": (torch.float32, RowKernel(gemv_kernels.grouped_gemv_f32, torch.float32)),
}
if PairsOfBf16.available():
    pairs = RowKernel(gemv_kernels.grouped_gemv_bf16_pairs, torch.bfloat16)
    ROW_KERNELS["bf16-pairs"] = (torch.bfloat16, pairs)
Array = np.ndarray[Any, Any]


def weights(dtype: torch.dtype, columns: int = COLUMNS) -> torch.Tensor:
    """One matrix per slot, with zeros, small values and both signs."""
    values = torch.randn(SLOTS, ROWS, columns, generator=torch.Generator().manual_seed(0))
    values[:, 0, :4] = torch.tensor([0.0, -0.0, 1e-6, -3e-7])
    return values.to(dtype)


def inputs(columns: int = COLUMNS) -> torch.Tensor:
    """Values that bf16 represents exactly, so that no kernel rounds them."""
    return torch.randn(TOKENS, columns, generator=torch.Generator().manual_seed(1)).bfloat16().float()


def expected(matrices: torch.Tensor, x: torch.Tensor) -> Array:
    """out[p] = W(slot of p) · x[token of p] in float64."""
    exact = matrices.double().numpy()
    owners = [slot for at, slot in enumerate(CHOSEN) for _ in range(STARTS[at], STARTS[at + 1])]
    return np.stack([exact[slot] @ x.double().numpy()[token] for slot, token in zip(owners, OF_TOKENS, strict=True)])


def pool_of(matrices: torch.Tensor) -> torch.Tensor:
    """Slots with `PADDING` values before each matrix, as if it were not the record's first part."""
    before = PADDING * matrices.dtype.itemsize
    pool = torch.full((SLOTS, before + matrices[0].nbytes), 0x7F, dtype=torch.uint8)
    pool[:, before:] = matrices.contiguous().view(SLOTS, -1).view(torch.uint8)
    return pool


def run(kernel: RowKernel, matrices: torch.Tensor, x: torch.Tensor, spans: list[tuple[int, int]]) -> Array:
    out = gemv_kernels.results(len(OF_TOKENS), ROWS)
    out[:] = torch.nan
    pool, values = pool_of(matrices), x[OF_TOKENS].to(kernel.inputs)
    matrix = pool.data_ptr() + PADDING * matrices.dtype.itemsize
    job = Matrix(matrix, pool.stride(0), matrices.shape[-1]).product(Groups(CHOSEN, STARTS), values, out)
    for first, last in spans:
        kernel.loop.call(job.address, 0, first, last)
    return np.asarray(out.numpy())


@pytest.mark.parametrize("spans", [[(0, ROWS)], [(4, ROWS), (0, 4)]], ids=["whole", "in-parts"])
@pytest.mark.parametrize("columns", [32, 64, 96, 128, 160, 288])
@pytest.mark.parametrize("name", ROW_KERNELS)
def test_rows(name: str, columns: int, spans: list[tuple[int, int]]) -> None:
    dtype, kernel = ROW_KERNELS[name]
    matrices, x = weights(dtype, columns), inputs(columns)
    np.testing.assert_allclose(run(kernel, matrices, x, spans), expected(matrices, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("columns", [1, 2, 7, 14, 31, 33])
@pytest.mark.parametrize("name", ["bf16", "fp16", "fp32"])
def test_short_rows(name: str, columns: int) -> None:
    dtype, kernel = ROW_KERNELS[name]
    matrices = torch.randn(SLOTS, ROWS, columns, generator=torch.Generator().manual_seed(2)).to(dtype)
    x = inputs(columns)
    out = run(kernel, matrices, x, [(0, ROWS)])
    np.testing.assert_allclose(out, expected(matrices, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_transposed(dtype: torch.dtype, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Split over threads, and in blocks that divide neither rows nor columns."""
    monkeypatch.setattr("edgemoe.kernels.cpu.threads.MIN_SPLIT_NBYTES", 0)
    wide = torch.randn(SLOTS, 1300, COLUMNS + 7, generator=torch.Generator().manual_seed(3)).to(dtype)
    matrices = wide.transpose(1, 2).contiguous()
    x = inputs(COLUMNS + 7)
    pool = pool_of(matrices)
    matrix = SlotMatrix(dtype, (1300, COLUMNS + 7), pool, PADDING * dtype.itemsize, transposed=True)
    threads = KernelThreads(count)
    out = matrix.multiply(threads, Groups(CHOSEN, STARTS), x[OF_TOKENS])
    np.testing.assert_allclose(out.numpy(), expected(wide, x), rtol=1e-4, atol=1e-4)
    for pair, token in enumerate(OF_TOKENS):
        group = int(np.searchsorted(STARTS, pair, side="right")) - 1
        alone = matrix.multiply(threads, Groups(CHOSEN[group : group + 1], np.array([0, 1])), x[token : token + 1])
        assert torch.equal(out[pair], alone[0])
    threads.close()


@pytest.mark.parametrize("name", ROW_KERNELS)
def test_only_the_requested_rows_are_written(name: str) -> None:
    dtype, kernel = ROW_KERNELS[name]
    out = run(kernel, weights(dtype), inputs(), [(2, 5)])
    assert np.isnan(out[:, :2]).all()
    assert np.isnan(out[:, 5:]).all()
    assert not np.isnan(out[:, 2:5]).any()


def test_fp16_is_exact_over_its_finite_range() -> None:
    values = torch.tensor([65504.0, -65504.0, 6.1e-5, 5.96e-8, -5.96e-8, 0.0, 1.0, -2.5]).half()
    matrices = values.repeat(SLOTS, ROWS, 1)
    _, kernel = ROW_KERNELS["fp16"]
    for at in range(len(values)):
        x = torch.zeros(TOKENS, len(values))
        x[:, at] = 1
        assert (run(kernel, matrices, x, [(0, ROWS)]) == float(values[at])).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_weight_dtype_has_a_kernel_that_takes_any_input_dtype(dtype: torch.dtype) -> None:
    matrices, x = weights(dtype), inputs()
    matrix = SlotMatrix(dtype, (ROWS, COLUMNS), pool_of(matrices), PADDING * dtype.itemsize)
    threads = KernelThreads(1)
    for given in (torch.float32, torch.bfloat16, torch.float64):
        strided = torch.stack([x, x], dim=1).to(given)[OF_TOKENS, 0]
        out = matrix.multiply(threads, Groups(CHOSEN, STARTS), torch.stack([strided, strided], dim=1)[:, 0])
        np.testing.assert_allclose(out.numpy(), expected(matrices, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn])
def test_other_dtypes_have_no_kernel(dtype: torch.dtype) -> None:
    assert not SlotMatrix.fits(dtype, 8)
    assert not SlotMatrix.fits(dtype, 8, transposed=True)
