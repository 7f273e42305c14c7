"""A tree within its bounds, and the candidates for it in their order."""

from __future__ import annotations

import random
from itertools import islice

import pytest

from edgemoe.draft.controller import Setting
from edgemoe.draft.tree_builder import TreeBuilder
from edgemoe.model.draft_tree import Candidate
from tests.support.crowd import new_request


def builder(max_nodes: int = 8, max_depth: int = 4, *, chain: bool = False) -> TreeBuilder:
    setting = Setting(max_depth, 1 if chain else 4, passes=True)
    return TreeBuilder(new_request(0, [5, 6, 7]), max_nodes, setting)


def test_it_begins_with_the_last_token_which_no_pass_has_run() -> None:
    growing = builder()
    assert growing.tree.tokens == [7]
    assert growing.unexpanded == [0]
    assert not growing.full
    assert growing.fits(0)
    assert builder(max_nodes=0).full
    assert not builder(max_nodes=0).fits(0)
    assert not builder(max_depth=0).fits(0)


@pytest.mark.parametrize("seed", range(4))
def test_no_tree_outgrows_its_bounds(seed: int) -> None:
    """Whatever is offered: as many nodes and as deep as is allowed, and no wider than a chain where that is asked."""
    draw = random.Random(seed)
    max_nodes, max_depth, chain = draw.randint(1, 12), draw.randint(1, 5), bool(seed % 2)
    growing = builder(max_nodes, max_depth, chain=chain)
    for _ in range(60):
        parent = draw.randrange(len(growing.tree))
        growing.propose(Candidate(parent, draw.randrange(9), growing.tree.probabilities[parent] * draw.random()))
        for candidate in islice(growing.best_proposals(), 2):
            growing.add(candidate)
    tree = growing.tree
    assert tree.drafted <= max_nodes
    assert max(tree.depths) <= max_depth
    assert growing.unexpanded == list(range(len(tree)))
    assert growing.full == (tree.drafted == max_nodes)
    assert tree.drafted == (min(max_nodes, max_depth) if chain else max_nodes)
    assert tree.is_chain or not chain


def test_offers_come_best_first_and_equal_ones_in_their_order() -> None:
    growing = builder()
    for token, probability in ((1, 0.2), (2, 0.5), (3, 0.5), (4, 0.9)):
        growing.propose(Candidate(0, token, probability))
    assert [candidate.token for candidate in growing.best_proposals()] == [4, 2, 3, 1]
    assert list(growing.best_proposals()) == []


def test_what_is_left_waits_for_the_next_round() -> None:
    growing = builder()
    for token, probability in ((1, 0.2), (2, 0.5), (3, 0.4)):
        growing.propose(Candidate(0, token, probability))
    assert [candidate.token for candidate in islice(growing.best_proposals(), 1)] == [2]
    growing.propose(Candidate(0, 4, 0.3))
    assert [candidate.token for candidate in growing.best_proposals()] == [3, 4, 1]


def test_an_offer_is_judged_when_its_turn_comes() -> None:
    growing = builder(max_nodes=2)
    for token in (1, 2, 3):
        growing.propose(Candidate(0, token, 1 / token))
    growing.add(Candidate(0, 1, 0.9))
    taken = []
    for candidate in growing.best_proposals():
        taken.append(candidate.token)
        growing.add(candidate)
    assert taken == [2], "1 is there already, and with 2 it is full"


def test_a_node_that_is_there_is_not_fresh_again_and_keeps_its_kind() -> None:
    growing = builder()
    growing.add(Candidate(0, 1, 0.5, 3))
    growing.add(Candidate(0, 2, 0.4))
    growing.unexpanded = []
    growing.add(Candidate(0, 1, 0.7, 8))
    growing.add(Candidate(0, 2, 0.1, 8))
    assert growing.unexpanded == []
    assert growing.bins == {1: 3, 2: 8}, "each is learnt of by its first bin"
    assert growing.tree.probabilities == [1.0, 0.7, 0.4]
    growing.add(Candidate(1, 2, 0.3, 5))
    assert (growing.unexpanded, growing.bins) == ([3], {1: 3, 2: 8, 3: 5})


def test_what_two_drafters_agree_on_is_the_surer_and_so_is_what_follows_it() -> None:
    growing = builder()
    for candidate in (Candidate(0, 1, 0.3), Candidate(1, 2, 0.15), Candidate(0, 7, 0.2), Candidate(2, 3, 0.1)):
        growing.add(candidate)
    growing.propose(Candidate(0, 1, 0.9, 4))
    growing.propose(Candidate(0, 7, 0.05, 2))
    assert growing.tree.probabilities == pytest.approx([1.0, 0.9, 0.45, 0.2, 0.3])
    assert growing.bins == {1: 4, 3: 2}
    assert list(growing.best_proposals()) == []


def test_a_chain_grows_at_its_end_only() -> None:
    growing = builder(chain=True)
    growing.add(Candidate(0, 1, 0.9))
    assert not growing.fits(0)
    assert growing.fits(1)
    growing.propose(Candidate(0, 2, 0.8))
    growing.propose(Candidate(1, 3, 0.1))
    assert [candidate.token for candidate in growing.best_proposals()] == [3]


# --- what passes may add ---------------------------------------------------------------------------


def test_a_pass_over_the_last_token_may_give_it_a_child() -> None:
    growing = builder()
    assert list(growing.openings([0])) == [(0, 0.0, 1)]
    assert list(builder(max_depth=0).openings([0])) == []


def test_what_was_drafted_without_a_pass_takes_passes_to_grow_on() -> None:
    """A chain of three: its end is run by the fourth pass, and the likelier the chain the less is left beside it."""
    growing = builder()
    for parent, token, probability in ((0, 1, 0.9), (1, 2, 0.8), (2, 3, 0.75)):
        growing.add(Candidate(parent, token, probability))
    assert list(growing.openings([0])) == [(0, 0.9, 1), (1, 0.8, 2), (2, 0.75, 3), (3, 0.0, 4)]
    growing.unexpanded.remove(0)
    assert list(growing.openings([1])) == [(1, 0.8, 1), (2, 0.75, 2), (3, 0.0, 3)]
    assert list(growing.openings([1, 2, 3])) == [(1, 0.8, 1), (2, 0.75, 1), (3, 0.0, 1)], "a drafter that runs trees"
    assert list(growing.openings([])) == []


def test_a_chain_grows_at_its_end_alone() -> None:
    growing = builder(chain=True)
    growing.add(Candidate(0, 1, 0.9))
    growing.add(Candidate(1, 2, 0.8))
    assert list(growing.openings([0])) == [(2, 0.0, 3)]
