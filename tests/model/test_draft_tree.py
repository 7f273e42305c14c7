"""Draft trees against a plain account of their paths."""

from __future__ import annotations

import random

import pytest
import torch

from edgemoe.model.draft_tree import DraftTree

Path = tuple[int, ...]


def random_tree(draw: random.Random, nodes: int, tokens: int = 4) -> tuple[DraftTree, list[Path]]:
    """A tree and the text of each of its nodes, the root's token first."""
    tree = DraftTree(9)
    paths: list[Path] = [(9,)]
    while len(paths) < nodes:
        parent, token = draw.randrange(len(paths)), draw.randrange(tokens)
        node = tree.add(parent, token, draw.random())
        path = (*paths[parent], token)
        assert (path in paths) == (node < len(paths)), "a node is made where there is none, and nowhere else"
        if node == len(paths):
            paths.append(path)
        assert paths[node] == path
    return tree, paths


@pytest.mark.parametrize("seed", range(8))
def test_it_is_what_its_paths_say(seed: int) -> None:
    draw = random.Random(seed)
    tree, paths = random_tree(draw, 1 + 3 * seed)
    assert len(tree) == len(paths) == tree.drafted + 1
    number = {path: node for node, path in enumerate(paths)}
    for node, path in enumerate(paths):
        assert tree.tokens[node] == path[-1]
        assert tree.depths[node] == len(path) - 1
        assert tree.parents[node] == number.get(path[:-1], -1)
        assert tree.text(node) == list(path[1:])
        assert tree.path(node) == [number[path[:length]] for length in range(1, len(path) + 1)]
        assert tree.children(node) == [each for each, other in enumerate(paths) if other[:-1] == path]
        for token in range(5):
            assert tree.child(node, token) == number.get((*path, token))
    assert tree.is_chain == (max(map(len, paths)) == len(paths))


@pytest.mark.parametrize("seed", range(4))
def test_the_ancestry_is_who_lies_on_whose_path(seed: int) -> None:
    tree, paths = random_tree(random.Random(seed), 14)
    expected = [[path[: len(other)] == other for other in paths] for path in paths]
    assert tree.ancestry().dtype == torch.bool
    assert tree.ancestry().tolist() == expected


def test_a_root_alone_is_a_chain_and_nothing_is_drafted() -> None:
    tree = DraftTree(5)
    assert (len(tree), tree.drafted, tree.is_chain, tree.path(0), tree.text(0)) == (1, 0, True, [0], [])
    assert tree.probabilities == [1.0]
    assert tree.ancestry().tolist() == [[True]]


def test_a_tree_stops_being_a_chain_with_a_second_child_of_any_node() -> None:
    for parent in range(3):
        tree = DraftTree(5)
        last = 0
        for token in (1, 2, 3):
            last = tree.add(last, token, 0.5)
            assert tree.is_chain
        tree.add(parent, 8, 0.5)
        assert not tree.is_chain


def test_a_node_that_is_added_again_keeps_the_greater_probability() -> None:
    tree = DraftTree(5)
    node = tree.add(0, 7, 0.4)
    for probability, kept in ((0.2, 0.4), (0.9, 0.9), (0.1, 0.9)):
        assert tree.add(0, 7, probability) == node
        assert tree.probabilities == [1.0, kept]
    assert len(tree) == 2


def test_the_same_token_after_different_parents_is_different_nodes() -> None:
    tree = DraftTree(5)
    first = tree.add(0, 5, 0.5)
    second = tree.add(first, 5, 0.25)
    assert (first, second) == (1, 2)
    assert tree.text(second) == [5, 5]
