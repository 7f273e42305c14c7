"""Attention by kernels, against its definition in float64, and its bits in any company."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from edgemoe.kernels.cpu import attention
from edgemoe.kernels.cpu.attention import SeenKeys
from edgemoe.kernels.cpu.threads import KernelThreads

DTYPES = [torch.bfloat16, torch.float32]
CASES = [(4, 4, 16, 16), (8, 2, 64, 64), (6, 2, 48, 16), (5, 1, 16, 80)]
"""Heads of the query and of the keys, and the widths of keys and of values."""
TOKENS, KEYS = 5, 37


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[KernelThreads]:
    own = KernelThreads(request.param)
    yield own
    own.close()


def inputs(
    case: tuple[int, int, int, int], dtype: torch.dtype, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values; rows of a buffer that is longer, and queries as a projection leaves them."""
    heads, groups, width, depth = case
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(1, TOKENS, heads, width, generator=generator).to(dtype).transpose(1, 2)
    keys, values = (
        torch.randn(1, groups, KEYS + 10, each, generator=generator).to(dtype)[:, :, :KEYS] for each in (width, depth)
    )
    return query, keys, values


def expected(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, visible: torch.Tensor, scaling: float
) -> torch.Tensor:
    group = query.shape[1] // keys.shape[1]
    k, v = (each.double().repeat_interleave(group, 1) for each in (keys, values))
    scores = (query.double() @ k.transpose(2, 3)) * scaling
    return (scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v).transpose(1, 2)


def seen_by_tree() -> torch.Tensor:
    """Each token sees the first keys, but for one token all but a few, and single ones behind them."""
    visible = torch.zeros(TOKENS, KEYS, dtype=torch.bool)
    visible[:, :30] = True
    for token, places in enumerate([(30,), (31,), (30, 32), (31, 33), (30, 32, 36)]):
        visible[token, list(places)] = True
    visible[1, :11] = False
    return visible


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_it_is_what_its_definition_says(
    case: tuple[int, int, int, int], dtype: torch.dtype, threads: KernelThreads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgemoe.kernels.cpu.threads.MIN_SPLIT_NBYTES", 0)
    query, keys, values = inputs(case, dtype)
    assert attention.fits(query, keys, values)
    visible = seen_by_tree()
    found = attention.attend(threads, query, keys, values, SeenKeys.visible(visible), 0.3)
    assert found.shape == (1, TOKENS, case[0], case[3])
    tolerance = 1e-2 if dtype is torch.bfloat16 else 2e-6
    right = expected(query, keys, values, visible, 0.3)
    torch.testing.assert_close(found.double(), right, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_a_token_has_the_same_bits_alone_and_its_keys_side_by_side(
    case: tuple[int, int, int, int], dtype: torch.dtype, threads: KernelThreads
) -> None:
    query, keys, values = inputs(case, dtype, seed=1)
    visible = seen_by_tree()
    together = attention.attend(threads, query, keys, values, SeenKeys.visible(visible), None)
    for token in range(TOKENS):
        places = visible[token].nonzero()[:, 0]
        own = query[:, :, token : token + 1], keys[:, :, places], values[:, :, places]
        alone = attention.attend(KernelThreads(1), *own, SeenKeys.ranges([(0, len(places))]), None)
        assert torch.equal(together[:, token], alone[:, 0]), token


def test_large_scores_are_no_infinities(threads: KernelThreads) -> None:
    query, keys, values = inputs(CASES[0], torch.float32)
    seen = SeenKeys.ranges([(0, KEYS)] * TOKENS)
    found = attention.attend(threads, query * 1e4, keys, values, seen, 1.0)
    right = expected(query * 1e4, keys, values, torch.ones(TOKENS, KEYS, dtype=torch.bool), 1.0)
    torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-5)


def test_what_a_token_sees() -> None:
    visible = seen_by_tree()
    seen = SeenKeys.visible(visible)
    for token in range(TOKENS):
        pick = seen.of(token)
        assert torch.equal(torch.arange(KEYS)[pick], visible[token].nonzero()[:, 0])
    assert SeenKeys.ranges([(3, 9)]).of(0) == slice(3, 9)


def test_others_have_no_kernel() -> None:
    query, keys, values = inputs(CASES[0], torch.float32)
    assert not attention.fits(query[..., :7], keys[..., :7], values)
    assert not attention.fits(query.half(), keys.half(), values.half())
    assert not attention.fits(query, keys.bfloat16(), values)
    assert not attention.fits(query, keys.transpose(2, 3), values)
