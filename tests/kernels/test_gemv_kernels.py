"""The CPU kernels against float64, in every layout that they support."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from edgemoe.kernels.cpu import gemv_kernels
from edgemoe.kernels.cpu.dot_block import PairsOfBf16
from edgemoe.kernels.cpu.gemv_kernels import Kernel

SLOTS, ROWS, COLUMNS, TOKENS, PADDING = 5, 7, 160, 4, 32
CHOSEN = np.array([3, 0, 4, 1, 2])
STARTS = np.array([0, 2, 2, 5, 6, 16])
"""Slot 3 has two pairs, slot 0 none, slot 4 three, slot 1 one and slot 2 ten: blocks of every size."""
OF_TOKENS = np.array([1, 3, 0, 0, 2, 3, 0, 1, 2, 3, 3, 2, 1, 0, 2, 1])
ROW_KERNELS = {
    "bf16": (torch.bfloat16, Kernel(gemv_kernels.grouped_gemv_bf16, np.uint16, 64)),
    "fp16": (torch.float16, Kernel(gemv_kernels.grouped_gemv_f16, np.uint16, 64)),
    "fp32": (torch.float32, Kernel(gemv_kernels.grouped_gemv_f32, np.float32, 2)),
}
if PairsOfBf16.available():
    ROW_KERNELS["bf16-pairs"] = (
        torch.bfloat16,
        Kernel(gemv_kernels.grouped_gemv_bf16_pairs, np.uint16, 64, takes_bf16=True),
    )
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


def pool_of(matrices: torch.Tensor, unit: Any) -> Array:
    """Slots with `PADDING` values before each matrix, as if it were not the record's first part."""
    size = matrices.dtype.itemsize
    pool = torch.full((SLOTS, PADDING * size + matrices[0].nbytes), 0x7F, dtype=torch.uint8)
    pool[:, PADDING * size :] = matrices.contiguous().view(SLOTS, -1).view(torch.uint8)
    return np.asarray(pool.numpy().view(unit))


def run(kernel: Kernel, matrices: torch.Tensor, x: torch.Tensor, extent: int, spans: list[tuple[int, int]]) -> Array:
    out: Array = kernel.results(len(OF_TOKENS), ROWS)
    out[:] = np.nan
    offset = PADDING * matrices.dtype.itemsize // np.dtype(kernel.unit).itemsize
    pool, values = pool_of(matrices, kernel.unit), kernel.values(x[OF_TOKENS])
    for first, last in spans:
        kernel.run(CHOSEN, offset, extent, pool, STARTS, values, out, first, last)
    return out


@pytest.mark.parametrize("spans", [[(0, ROWS)], [(4, ROWS), (0, 4)]], ids=["whole", "in-parts"])
@pytest.mark.parametrize("columns", [32, 64, 96, 128, 160, 288])
@pytest.mark.parametrize("name", ROW_KERNELS)
def test_rows(name: str, columns: int, spans: list[tuple[int, int]]) -> None:
    dtype, kernel = ROW_KERNELS[name]
    matrices, x = weights(dtype, columns), inputs(columns)
    np.testing.assert_allclose(run(kernel, matrices, x, columns, spans), expected(matrices, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("columns", [1, 2, 7, 14, 31, 33])
@pytest.mark.parametrize("name", ["bf16", "fp16", "fp32"])
def test_short_rows(name: str, columns: int) -> None:
    dtype, kernel = ROW_KERNELS[name]
    matrices = torch.randn(SLOTS, ROWS, columns, generator=torch.Generator().manual_seed(2)).to(dtype)
    x = inputs(columns)
    out = run(kernel, matrices, x, columns, [(0, ROWS)])
    np.testing.assert_allclose(out, expected(matrices, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spans", [[(0, ROWS)], [(4, ROWS), (0, 4)]], ids=["whole", "in-parts"])
def test_transposed(spans: list[tuple[int, int]]) -> None:
    kernel = gemv_kernels.column_kernel(torch.bfloat16)
    assert kernel is not None
    matrices, x = weights(torch.bfloat16), inputs()
    out = run(kernel, matrices.transpose(1, 2).contiguous(), x, ROWS, spans)
    np.testing.assert_allclose(out, expected(matrices, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ROW_KERNELS)
def test_only_the_requested_rows_are_written(name: str) -> None:
    dtype, kernel = ROW_KERNELS[name]
    out = run(kernel, weights(dtype), inputs(), COLUMNS, [(2, 5)])
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
        assert (run(kernel, matrices, x, len(values), [(0, ROWS)]) == float(values[at])).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_weight_dtype_has_a_kernel_that_takes_any_input_dtype(dtype: torch.dtype) -> None:
    kernel = gemv_kernels.row_kernel(dtype, COLUMNS)
    assert kernel is not None
    matrices, x = weights(dtype), inputs()
    for given in (torch.float32, torch.bfloat16, torch.float64):
        strided = torch.stack([x, x], dim=1).to(given)[:, 0]
        assert not strided.is_contiguous()
        strided_values = kernel.values(strided)
        np.testing.assert_array_equal(strided_values, kernel.values(x.to(given)))
        out = run(kernel, matrices, strided, COLUMNS, [(0, ROWS)])
        np.testing.assert_allclose(out, expected(matrices, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn])
def test_other_dtypes_have_no_kernel(dtype: torch.dtype) -> None:
    assert gemv_kernels.row_kernel(dtype, 8) is None
    assert gemv_kernels.column_kernel(dtype) is None
