"""A tree within its bounds, and the candidates for it in their order."""

from __future__ import annotations

import random
from itertools import islice

import pytest
from crowd import generation

from edgemoe.draft_tree import Candidate
from edgemoe.generation import Cancels
from edgemoe.growth import Growth
from edgemoe.utility import Setting


def growth(most_nodes: int = 8, most_depth: int = 4, *, chain: bool = False) -> Growth:
    setting = Setting(most_depth, 1 if chain else 4, passes=True)
    return Growth(generation(0, [5, 6, 7], Cancels()), most_nodes, setting)


def test_it_begins_with_the_last_token_which_no_pass_has_run() -> None:
    growing = growth()
    assert growing.tree.tokens == [7]
    assert growing.fresh == [0]
    assert not growing.full
    assert growing.fits(0)
    assert growth(most_nodes=0).full
    assert not growth(most_nodes=0).fits(0)
    assert not growth(most_depth=0).fits(0)


@pytest.mark.parametrize("seed", range(4))
def test_no_tree_outgrows_its_bounds(seed: int) -> None:
    """Whatever is offered: as many nodes and as deep as is allowed, and no wider than a chain where that is asked."""
    draw = random.Random(seed)
    most_nodes, most_depth, chain = draw.randint(1, 12), draw.randint(1, 5), bool(seed % 2)
    growing = growth(most_nodes, most_depth, chain=chain)
    for _ in range(60):
        parent = draw.randrange(len(growing.tree))
        growing.offer(Candidate(parent, draw.randrange(9), growing.tree.probabilities[parent] * draw.random()))
        for candidate in islice(growing.best_offers(), 2):
            growing.add(candidate)
    tree = growing.tree
    assert tree.drafted <= most_nodes
    assert max(tree.depths) <= most_depth
    assert growing.fresh == list(range(len(tree)))
    assert growing.full == (tree.drafted == most_nodes)
    assert tree.drafted == (min(most_nodes, most_depth) if chain else most_nodes)
    assert tree.is_chain or not chain


def test_offers_come_best_first_and_equal_ones_in_their_order() -> None:
    growing = growth()
    for token, probability in ((1, 0.2), (2, 0.5), (3, 0.5), (4, 0.9)):
        growing.offer(Candidate(0, token, probability))
    assert [candidate.token for candidate in growing.best_offers()] == [4, 2, 3, 1]
    assert list(growing.best_offers()) == []


def test_what_is_left_waits_for_the_next_round() -> None:
    growing = growth()
    for token, probability in ((1, 0.2), (2, 0.5), (3, 0.4)):
        growing.offer(Candidate(0, token, probability))
    assert [candidate.token for candidate in islice(growing.best_offers(), 1)] == [2]
    growing.offer(Candidate(0, 4, 0.3))
    assert [candidate.token for candidate in growing.best_offers()] == [3, 4, 1]


def test_an_offer_is_judged_when_its_turn_comes() -> None:
    growing = growth(most_nodes=2)
    for token in (1, 2, 3):
        growing.offer(Candidate(0, token, 1 / token))
    growing.add(Candidate(0, 1, 0.9))
    taken = []
    for candidate in growing.best_offers():
        taken.append(candidate.token)
        growing.add(candidate)
    assert taken == [2], "1 is there already, and with 2 it is full"


def test_a_node_that_is_there_is_not_fresh_again_and_keeps_its_kind() -> None:
    growing = growth()
    growing.add(Candidate(0, 1, 0.5, 3))
    growing.add(Candidate(0, 2, 0.4))
    growing.fresh = []
    growing.add(Candidate(0, 1, 0.7, 8))
    growing.add(Candidate(0, 2, 0.1, 8))
    assert growing.fresh == []
    assert growing.bins == {1: 3, 2: 8}, "each is learnt of by its first bin"
    assert growing.tree.probabilities == [1.0, 0.7, 0.4]
    growing.add(Candidate(1, 2, 0.3, 5))
    assert (growing.fresh, growing.bins) == ([3], {1: 3, 2: 8, 3: 5})


def test_what_two_drafters_agree_on_is_the_surer_and_so_is_what_follows_it() -> None:
    growing = growth()
    for candidate in (Candidate(0, 1, 0.3), Candidate(1, 2, 0.15), Candidate(0, 7, 0.2), Candidate(2, 3, 0.1)):
        growing.add(candidate)
    growing.offer(Candidate(0, 1, 0.9, 4))
    growing.offer(Candidate(0, 7, 0.05, 2))
    assert growing.tree.probabilities == pytest.approx([1.0, 0.9, 0.45, 0.2, 0.3])
    assert growing.bins == {1: 4, 3: 2}
    assert list(growing.best_offers()) == []


def test_a_chain_grows_at_its_end_only() -> None:
    growing = growth(chain=True)
    growing.add(Candidate(0, 1, 0.9))
    assert not growing.fits(0)
    assert growing.fits(1)
    growing.offer(Candidate(0, 2, 0.8))
    growing.offer(Candidate(1, 3, 0.1))
    assert [candidate.token for candidate in growing.best_offers()] == [3]
