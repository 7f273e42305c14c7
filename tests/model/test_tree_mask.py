"""Who sees whom among drafted tokens, against an account of each token's text."""

from __future__ import annotations

import random

import pytest
import torch

from edgemoe.model.draft_tree import DraftTree, TreeMask, additive_mask
from edgemoe.model.kv_cache import SequenceCache
from edgemoe.model.model_runner import tree_input


def random_tree(draw: random.Random, nodes: int) -> DraftTree:
    tree = DraftTree(0)
    while len(tree) < nodes:
        # Mostly at the end, so that trees get deeper than the windows.
        parent = len(tree) - 1 if draw.random() < 0.6 else draw.randrange(len(tree))
        tree.add(parent, draw.randrange(50), 0.5)
    return tree


def seen_by(tree: DraftTree, node: int, base: int, window: int | None) -> set[tuple[str, int]]:
    """The rows that `node` attends to by the meaning of a window: of its own text the last `window` tokens."""
    text = [("past", place) for place in range(base)] + [("node", each) for each in tree.path(node)]
    return set(text if window is None else text[-window:])


@pytest.mark.parametrize("window", [None, 1, 2, 3, 6, 50])
@pytest.mark.parametrize("seed", range(6))
def test_every_token_sees_its_own_text_as_far_as_the_window_reaches(seed: int, window: int | None) -> None:
    """In passes over a tree's nodes, with as many rows of the past as a layer happens to hold."""
    draw = random.Random(seed)
    base, tree = draw.choice([0, 1, 4, 9, 30]), random_tree(draw, draw.randint(1, 14))
    first = 0
    while first < len(tree):
        last = min(len(tree), first + draw.randint(1, 6))
        work = tree_input(SequenceCache(None, 64, base + first), tree, range(first, last), range(first))
        tree_mask = work.tree_mask
        assert work.every
        assert list(work.tokens) == tree.tokens[first:last]
        assert list(work.positions) == [base + tree.depths[node] for node in range(first, last)]
        if tree_mask is None:
            assert tree.is_chain
            first = last
            continue
        least = base if window is None else min(base, window - 1)
        for held in {least, draw.randint(least, base), base}:
            rows = [("past", place) for place in range(base - held, base)] + [("node", node) for node in range(last)]
            visible = tree_mask.visible(len(rows), window)
            assert visible.shape == (last - first, len(rows))
            for node, row in zip(range(first, last), visible.tolist(), strict=True):
                assert {each for each, sees in zip(rows, row, strict=True) if sees} == seen_by(tree, node, base, window)
        first = last


def test_siblings_share_a_place_and_do_not_see_one_another() -> None:
    tree = DraftTree(1)
    left, right = tree.add(0, 2, 0.5), tree.add(0, 3, 0.5)
    tree.add(left, 4, 0.5)
    tree.add(right, 5, 0.5)
    tree_mask = tree_input(SequenceCache(None, 64, 10), tree, range(5), ()).tree_mask
    assert tree_mask is not None
    assert tree_mask.positions == [10, 11, 11, 12, 12]
    assert tree_mask.visible(15, None)[:, 10:].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 0, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 0, 1, 0, 1],
    ]
    assert tree_mask.visible(15, None)[:, :10].all()


def test_a_later_pass_lies_behind_the_rows_of_the_earlier_ones() -> None:
    tree = DraftTree(1)
    for token in (2, 3, 4):
        tree.add(0, token, 0.5)
    late = tree.add(2, 5, 0.5)
    tree_mask = tree_input(SequenceCache(None, 64, 14), tree, [late], [0, 1, 2, 3]).tree_mask
    assert tree_mask is not None
    assert (tree_mask.base, list(tree_mask.depths), tree_mask.positions) == (10, [0, 1, 1, 1, 2], [12])
    assert tree_mask.visible(15, None)[0, 10:].tolist() == [True, False, True, False, True]
    assert tree_mask.visible(15, 3)[0].tolist() == [False] * 10 + [True, False, True, False, True]
    assert tree_mask.visible(15, 2)[0].tolist() == [False] * 12 + [True, False, True]


def test_a_chain_needs_no_branches() -> None:
    tree = DraftTree(1)
    tree.add(tree.add(0, 2, 0.5), 3, 0.5)
    for nodes, drafted in (([0, 1, 2], []), ([1, 2], [0]), ([2], [0, 1])):
        work = tree_input(SequenceCache(None, 64, 7 + len(drafted)), tree, nodes, drafted)
        assert work.tree_mask is None
        assert (work.outputs, list(work.positions)) == (len(nodes), [7 + node for node in nodes])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_additive_mask_leaves_what_is_seen_and_hides_the_rest(dtype: torch.dtype) -> None:
    visible = torch.tensor([[True, False, True], [False, False, True]])
    mask = additive_mask(visible, dtype)
    assert mask.dtype == dtype
    assert mask.isfinite().all()
    assert torch.equal(mask == 0, visible)
    weights = (torch.zeros(2, 3, dtype=dtype) + mask).float().softmax(-1)
    assert weights.tolist() == [[0.5, 0.0, 0.5], [0.0, 0.0, 1.0]]


def test_a_window_hides_the_same_rows_however_many_the_layer_holds() -> None:
    tree_mask = TreeMask(20, [0, 1, 1], torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]], dtype=torch.bool))
    whole = tree_mask.visible(23, 5)
    for held in range(4, 20):
        assert torch.equal(tree_mask.visible(held + 3, 5), whole[:, -held - 3 :])
