"""Samples from a device's logits are those from all of them, whichever part of them was read."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from edgemoe.draft.pass_drafter import Branch
from edgemoe.model.draft_tree import DraftTree
from edgemoe.model.pass_logits import BEST, DeviceRow
from tests.support.crowd import new_request
from tests.support.logits import CountedLogits, spoiled_topk
from tests.support.samplers import sampler

VOCABULARY = 3000
TEXT = [4, 90, 7, 90]
SMALL = [BEST * 3 * 4]
"""The one copy of a row's best."""
FEW: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"top_k": 1},
    {"top_k": 20},
    {"top_k": 20, "temperature": 0.6},
    {"top_k": 20, "top_p": 0.8, "temperature": 0.6},
    {"top_k": 40, "min_p": 0.1},
    {"top_k": 20, "top_p": 0.95, "min_p": 0.02, "temperature": 1.3},
]
ALL: list[dict[str, Any]] = [
    {"temperature": 0.7},
    {"top_p": 0.9},
    {"min_p": 0.1},
    {"top_k": BEST},
    {"top_k": 500, "top_p": 0.9},
    {"temperature": 0.0, "repetition_penalty": 1.3},
    {"top_k": 20, "repetition_penalty": 1.3},
    {"top_k": 20, "presence_penalty": 0.5},
    {"temperature": 0.0, "frequency_penalty": 0.5},
]


def logits_of(seed: int, kind: str = "plain") -> torch.Tensor:
    drawn = 3 * torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed))
    if kind == "ties":
        drawn = drawn.round()
    return drawn.bfloat16() if kind == "bfloat16" else drawn


def on_device(logits: torch.Tensor) -> tuple[DeviceRow, list[int]]:
    made = CountedLogits(logits[None])
    return made.split([1])[0][0], made.reads


@pytest.mark.parametrize("kind", ["plain", "bfloat16", "ties"])
@pytest.mark.parametrize("settings", [*FEW, *ALL], ids=str)
def test_samples_are_those_from_all_logits(
    settings: dict[str, Any], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, found = (sampler(VOCABULARY, len(TEXT), seed=5, **settings) for _ in range(2))
    for seed in range(40):
        logits = logits_of(seed, kind)
        expected = plain.draw(TEXT, logits.float())
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "topk", spoiled_topk)
            row, _ = on_device(logits)
            assert row.logits.best.values.shape == (1, BEST)
        assert found.draw(TEXT, row) == expected


@pytest.mark.parametrize("settings", FEW, ids=str)
def test_the_best_few_are_all_that_is_read(settings: dict[str, Any]) -> None:
    drawing = sampler(VOCABULARY, len(TEXT), **settings)
    for seed in range(10):
        row, reads = on_device(logits_of(seed))
        drawing.draw(TEXT, row)
        assert reads == SMALL


@pytest.mark.parametrize("settings", ALL, ids=str)
def test_all_logits_are_read_where_they_matter(settings: dict[str, Any]) -> None:
    row, reads = on_device(logits_of(1))
    sampler(VOCABULARY, len(TEXT), **settings).draw(TEXT, row)
    assert reads[-1] == VOCABULARY * 4


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"top_k": 20}], ids=str)
def test_all_logits_are_read_where_too_many_are_equal(settings: dict[str, Any]) -> None:
    logits = torch.zeros(VOCABULARY)
    logits[7:207] = 1.0
    row, reads = on_device(logits)
    plain, found = (sampler(VOCABULARY, len(TEXT), **settings) for _ in range(2))
    assert found.draw(TEXT, row) == plain.draw(TEXT, logits)
    assert reads == [*SMALL, VOCABULARY * 4]


@pytest.mark.parametrize("settings", [*FEW, *ALL], ids=str)
def test_candidates_are_those_from_all_logits(settings: dict[str, Any]) -> None:
    drawing = sampler(VOCABULARY, len(TEXT), **settings)
    for seed in range(10):
        logits = logits_of(seed)
        row, _ = on_device(logits)
        expected, found = drawing.candidates(TEXT, logits, 4, ahead=2), drawing.candidates(TEXT, row, 4, ahead=2)
        assert [token for token, _ in found] == [token for token, _ in expected]
        assert [share for _, share in found] == pytest.approx([share for _, share in expected], rel=1e-4)


def test_greedy_candidates_take_no_more_than_the_best_few() -> None:
    row, reads = on_device(logits_of(3))
    assert len(sampler(VOCABULARY, len(TEXT), temperature=0.0).candidates(TEXT, row, 4)) == 4
    assert reads == SMALL


def test_a_request_gets_the_same_tokens_and_logprobs() -> None:
    """Along a tree, too; its log-probabilities are those of all logits, which are read for them alone."""
    rows = torch.stack([logits_of(seed)[:264] for seed in range(3)])
    for logprobs in (None, 2):
        settings: dict[str, Any] = {"temperature": 0.0, "logprobs": logprobs, "max_tokens": 9}
        plain, found = (new_request(0, [5, 6, 7], **settings) for _ in range(2))
        logits = CountedLogits(rows)
        first, others = logits.split([1, 2])
        plain.advance(rows[0])
        found.advance(first[-1])
        tree = DraftTree(plain.tokens[-1])
        branch = Branch(plain, tree, [tree.add(0, int(rows[1].argmax()), 0.9)])
        assert found.verify(branch.tree, others) == plain.verify(branch.tree, rows[1:]) == [0, 1]
        assert found.tokens == plain.tokens
        assert [chunk.logprobs for chunk in found.chunks] == [chunk.logprobs for chunk in plain.chunks]
        assert len(logits.reads) == (1 if logprobs is None else 2)
