"""The cost of extra tokens where it is no straight line."""

from __future__ import annotations

import pytest

from edgemoe.draft.proposer import MARGIN, DraftPrice
from edgemoe.draft.step_cost import StepCost
from edgemoe.draft.token_curve import KNOTS, TokenCurve
from edgemoe.model.draft_tree import DraftTree


def measured(curve: dict[int, float], times: int = 400) -> TokenCurve:
    made = TokenCurve()
    for extra, seconds in curve.items():
        for _ in range(times):
            made.observe(extra, extra, seconds)
    return made


def test_before_anything_is_measured_it_is_a_line() -> None:
    curve = TokenCurve()
    for extra in (0, 1, 2, 5, 15, 40):
        assert curve.cost(extra, 0.3) == pytest.approx(0.3 * extra)
        assert curve.next_token(extra, 0.3) == pytest.approx(0.3)


def test_it_goes_through_what_was_measured() -> None:
    seconds = {1: 1.0, 2: 1.1, 3: 1.2, 7: 1.6, 15: 2.4, 31: 4.0}
    curve = measured(seconds)
    for extra, expected in seconds.items():
        assert curve.cost(extra, 0.2) == pytest.approx(expected, rel=0.05)
    assert curve.cost(5, 0.2) == pytest.approx(1.4, rel=0.05)


def test_it_never_falls() -> None:
    curve = measured({1: 1.0, 2: 0.1, 3: 0.1, 7: 0.1, 15: 3.0})
    costs = [curve.cost(extra, 0.1) for extra in range(40)]
    assert costs == sorted(costs)


def test_a_jump_is_shared_by_the_tokens_that_follow_it() -> None:
    """A second token as dear as a step, and six more for little: worth it for seven tokens, not for one."""
    curve = measured({1: 1.0, 2: 1.05, 3: 1.1, 7: 1.3, 15: 4.0, 31: 12.0})
    assert curve.next_token(0, 0.2) == pytest.approx(1.3 / 7, rel=0.1)
    assert curve.next_token(1, 0.2) == pytest.approx(0.05, rel=0.2)
    assert curve.next_token(7, 0.2) > 0.3


def test_what_is_not_measured_any_more_returns_to_the_average() -> None:
    curve = measured({3: 9.0})
    assert curve.cost(3, 0.1) > 8
    for _ in range(200):
        curve.fade(0.1)
    assert curve.cost(3, 0.1) == pytest.approx(0.3, rel=1e-3)


def jumping() -> StepCost:
    """Plain steps of a second; the second token costs another one, those after it almost nothing."""
    cost = StepCost()
    for _ in range(20):
        cost.observe(1.0)
    for _ in range(300):
        for extra in KNOTS[:4]:
            cost.observe_extra(extra, 2.0 + 0.02 * extra)
        cost.observe(1.0)
    return cost


def tree(nodes: int) -> DraftTree:
    made, parent = DraftTree(0), 0
    for number in range(nodes):
        parent = made.add(parent, number, 0.9)
    return made


def test_a_short_draft_behind_a_jump_is_given_up_and_a_long_one_is_not() -> None:
    price = DraftPrice(True, jumping(), 1.0, 0.0)
    assert price.pays(0.9, 0), "more may follow"
    assert price.best_size(tree(1)) == 0
    assert price.best_size(tree(7)) == 7
    assert DraftPrice(False, jumping(), 1.0, 0.0).best_size(tree(1)) == 1, "nothing is priced"


def test_a_draft_is_cut_where_it_gains_most() -> None:
    price = DraftPrice(True, jumping(), 1.0, 0.0)
    made = tree(5)
    for probability in (0.011, 0.01, 0.01):
        made.add(made.drafted, 9, probability)
    assert price.best_size(made) == 5, "the rest is worth less than it costs"
    made.truncate(5)
    assert (made.drafted, made.add(5, 9, 0.5)) == (5, 6)


def test_on_a_line_a_tree_of_nodes_that_pay_pays() -> None:
    cost = StepCost()
    for _ in range(20):
        cost.observe(1.0)
    price = DraftPrice(True, cost, 1.0, 0.0)
    least = MARGIN * cost.token
    made, parent = DraftTree(0), 0
    for number in range(9):
        assert price.pays(least * 1.0000001, made.drafted)
        parent = made.add(parent, number, least)
    assert price.best_size(made) == made.drafted
