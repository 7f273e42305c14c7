"""The CPU kernels against float64, in every layout they are made for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from edgemoe import kernels

SLOTS, ROWS, COLUMNS, TOKENS, PADDING = 5, 7, 12, 4, 8
CHOSEN = np.array([3, 0, 4])
STARTS = np.array([0, 2, 2, 5])
"""Slot 3 has two pairs, slot 0 none and slot 4 three."""
OF_TOKENS = np.array([1, 3, 0, 0, 2])


def weights(dtype: torch.dtype) -> torch.Tensor:
    """A matrix a slot, with subnormals, zeros and both signs among the values."""
    values = torch.randn(SLOTS, ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    values[:, 0, :4] = torch.tensor([0.0, -0.0, 1e-6, -3e-7])
    return values.to(dtype)


def expected(matrices: torch.Tensor, x: torch.Tensor) -> np.ndarray[Any, Any]:
    """out[p] = W(slot of p) · x[token of p] in float64."""
    exact = matrices.double().numpy()
    owners = [slot for at, slot in enumerate(CHOSEN) for _ in range(STARTS[at], STARTS[at + 1])]
    return np.stack([exact[slot] @ x.double().numpy()[token] for slot, token in zip(owners, OF_TOKENS, strict=True)])


def pool_of(matrices: torch.Tensor) -> torch.Tensor:
    """Slots of bytes with `PADDING` values before each matrix, as when it is not a record's first part."""
    size = matrices.dtype.itemsize
    pool = torch.full((SLOTS, (PADDING + ROWS * COLUMNS) * size), 0x7F, dtype=torch.uint8)
    pool[:, PADDING * size :] = matrices.contiguous().view(SLOTS, -1).view(torch.uint8)
    return pool


def run(
    kernel: Callable[..., None], unit: Any, matrices: torch.Tensor, x: torch.Tensor, extent: int, spans: Any
) -> np.ndarray[Any, Any]:
    out = np.full((len(OF_TOKENS), ROWS), np.nan, np.float32)
    offset = PADDING * matrices.dtype.itemsize // np.dtype(unit).itemsize
    pool = pool_of(matrices).numpy().view(unit)
    for first, last in spans:
        kernel(CHOSEN, offset, extent, pool, OF_TOKENS, STARTS, x.numpy(), out, first, last)
    return out


@pytest.mark.parametrize("spans", [[(0, ROWS)], [(4, ROWS), (0, 4)]], ids=["whole", "in-parts"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rows(dtype: torch.dtype, spans: list[tuple[int, int]]) -> None:
    found = kernels.row_kernel(dtype, COLUMNS)
    assert found is not None
    matrices = weights(dtype)
    x = torch.randn(TOKENS, COLUMNS, generator=torch.Generator().manual_seed(1))
    out = run(*found, matrices, x, COLUMNS, spans)
    np.testing.assert_allclose(out, expected(matrices, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spans", [[(0, ROWS)], [(4, ROWS), (0, 4)]], ids=["whole", "in-parts"])
def test_transposed(spans: list[tuple[int, int]]) -> None:
    found = kernels.column_kernel(torch.bfloat16)
    assert found is not None
    matrices = weights(torch.bfloat16)
    x = torch.randn(TOKENS, COLUMNS, generator=torch.Generator().manual_seed(1))
    out = run(*found, matrices.transpose(1, 2).contiguous(), x, ROWS, spans)
    np.testing.assert_allclose(out, expected(matrices, x), rtol=1e-5, atol=1e-5)


def test_only_the_asked_rows_are_written() -> None:
    found = kernels.row_kernel(torch.float32, COLUMNS)
    assert found is not None
    out = run(*found, weights(torch.float32), torch.ones(TOKENS, COLUMNS), COLUMNS, [(2, 5)])
    assert np.isnan(out[:, :2]).all()
    assert np.isnan(out[:, 5:]).all()
    assert not np.isnan(out[:, 2:5]).any()


def test_fp16_covers_its_whole_finite_range() -> None:
    values = torch.tensor([65504.0, -65504.0, 6.1e-5, 5.96e-8, -5.96e-8, 0.0, 1.0, -2.5]).half()
    matrices = values.repeat(SLOTS, ROWS, 1)
    for at in range(len(values)):
        x = torch.zeros(TOKENS, len(values))
        x[:, at] = 1
        out = np.empty((len(OF_TOKENS), ROWS), np.float32)
        pool = matrices.view(SLOTS, -1).view(torch.uint8).numpy().view(np.uint16)
        kernels.gather_f16(CHOSEN, 0, len(values), pool, OF_TOKENS, STARTS, x.numpy(), out, 0, ROWS)
        assert (out == float(values[at])).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn])
def test_other_dtypes_have_no_kernel(dtype: torch.dtype) -> None:
    assert kernels.row_kernel(dtype, 8) is None
    assert kernels.column_kernel(dtype) is None


def test_an_odd_bf16_row_has_no_kernel() -> None:
    assert kernels.row_kernel(torch.bfloat16, 7) is None
    assert kernels.row_kernel(torch.bfloat16, 8) is not None
