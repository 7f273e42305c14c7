"""What a budget does to the tokens of a layer, by hand: whole passes and their parts, bytes, and odd choices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from edgemoe.experts.budget_routing import BudgetRouting, BudgetTotals
from edgemoe.experts.router_hook import Choice
from edgemoe.prefetch.budget import Budget, Unit


class Store:
    """As much of a store as routing looks at."""

    slot_nbytes = 100


class Residents:
    """As much of a cache."""

    store = Store()

    def __init__(self, residents: Sequence[int], experts: Sequence[int]) -> None:
        self._residents = [[number for number in residents if number < count] for count in experts]

    def residents(self, layer: int) -> list[int]:
        return self._residents[layer]


def told(
    amount: float,
    rows: Sequence[float],
    unit: Unit = Unit.EXPERTS,
    rule: str = "path",
    residents: Sequence[int] = (),
    experts: Sequence[int] = (6,),
    dropped: str = "substitute",
) -> BudgetRouting:
    cache: Any = Residents(residents, experts)
    return BudgetRouting(Budget(unit, amount, rule), dropped, cache, experts, torch.tensor(rows), BudgetTotals())


def scores(*wanted: Sequence[int], experts: int = 6) -> torch.Tensor:
    """Probabilities that fall by half from the first of each token's `wanted` to the last."""
    rows = torch.full((len(wanted), experts), 0.01)
    for token, order in enumerate(wanted):
        for place, expert in enumerate(order):
            rows[token, expert] = 0.5 ** (place + 1)
    return rows


def taken(route: BudgetRouting, rows: torch.Tensor, layer: int = 0, top_k: int = 2) -> list[set[int]]:
    """What each token computes, its router choosing by `rows` and giving each the weight 1."""
    index = route.choose(layer, Choice(rows, top_k)).topk(top_k).indices
    index, weights = route.substitute(layer, index, torch.ones(index.shape))
    return [{int(e) for e, w in zip(*pair, strict=True) if w} for pair in zip(index, weights, strict=True)]


def test_parts_of_a_pass_have_their_shares_of_the_experts_one_after_the_other() -> None:
    """Side by side each sequence comes by a layer alone; together they keep to the budget."""
    route = told(2, [1.0, 1.0, 0.0, 1.0, 1.0])
    assert taken(route, scores([0, 1], [0, 1])) == [{0}, {0}], "half of two"
    assert taken(route, scores([4, 5])) == [{4, 5}], "a plain step"
    assert taken(route, scores([2, 3], [2, 3])) == [{2, 0}, {2, 0}], "one more, and what is there already"
    whole = told(2, [1.0, 1.0, 1.0, 1.0])
    assert taken(whole, scores([0, 1], [0, 1], [2, 0], [2, 0])) == [{0, 2}] * 4, "in one part both are for all"


def test_what_a_plain_step_wants_is_free_for_those_that_verify_beside_and_after_it() -> None:
    together = told(1, [0.0, 1.0], rule="residency")
    assert taken(together, scores([4, 5], [0, 4])) == [{4, 5}, {0, 4}]
    apart = told(1, [0.0, 1.0], rule="residency")
    assert taken(apart, scores([4, 5])) == [{4, 5}]
    assert taken(apart, scores([0, 4])) == [{0, 4}]
    by_path = told(1, [0.0, 1.0], rule="path")
    assert taken(by_path, scores([4, 5], [0, 4])) == [{4, 5}, {0}], "the paper's set counts whatever is in it"


def test_layers_share_bytes_equally_and_what_one_leaves_goes_to_those_behind() -> None:
    route = told(650, [1.0], Unit.NBYTES, experts=(6, 4, 6), residents=[0])
    # 650 / 3 pays for two, 450 / 2 for two, and 250 for two of the last one's three.
    assert taken(route, scores([5, 4, 3]), 0, 3) == [{5, 4}]
    assert taken(route, scores([3, 2, 1], experts=4), 1, 3) == [{3, 2}]
    assert taken(route, scores([5, 4, 3]), 2, 3) == [{5, 4}]
    route = told(650, [1.0], Unit.NBYTES, rule="residency", experts=(6, 4, 6), residents=[5, 3])
    assert taken(route, scores([5, 3, 1]), 0, 3) == [{5, 3, 1}], "one is moved"
    assert taken(route, scores([3, 2, 1], experts=4), 1, 3) == [{3, 2, 1}], "two of 550 / 2"
    assert taken(route, scores([2, 1, 0]), 2, 3) == [{2, 1, 0}], "and 350 pay for three"


def test_bytes_that_pay_for_nothing_leave_what_is_there() -> None:
    for dropped in ("substitute", "truncate"):
        route = told(50, [1.0, 1.0], Unit.NBYTES, rule="residency", residents=[1, 4, 5], dropped=dropped)
        rows = scores([0, 2], [0, 4])
        rows[0, 5] = 0.1
        assert taken(route, rows)[1] >= {4}
        assert all(each <= {1, 4, 5} for each in taken(told(50, [1.0, 1.0], Unit.NBYTES, "residency", [1, 4, 5]), rows))


def test_what_is_chosen_and_what_is_dropped_is_counted() -> None:
    route = told(2, [1.0, 0.5, 0.0])
    taken(route, scores([0, 1], [1, 2], [3, 4]))
    assert vars(route._totals) == {"budget_choices": 4, "budget_dropped": 1}


def test_who_has_all_in_the_set_is_left_alone_to_the_bit() -> None:
    route = told(2, [1.0, 1.0, 1.0])
    index, weights = torch.tensor([[1, 0], [2, 1], [0, 1]]), torch.tensor([[0.7, 0.2], [0.3, 0.3], [0.1, 0.05]])
    rows = scores([0, 1], [1, 2], [0, 1])
    route.choose(0, Choice(rows, 2))
    found, weighed = route.substitute(0, index, weights)
    assert torch.equal(found[[0, 2]], index[[0, 2]])
    assert torch.equal(weighed[[0, 2]], weights[[0, 2]])
    assert weighed[1].tolist() == [0.0, pytest.approx(0.3)]


def test_weights_of_a_family_that_normalises_keep_their_sum_and_others_their_values() -> None:
    index = torch.tensor([[0, 1], [1, 2], [0, 3]])
    even, uneven = (
        torch.tensor([[1.5, 1.0], [2.0, 0.5], [1.25, 1.25]]),
        torch.tensor([[0.5, 0.4], [0.2, 0.1], [0.3, 0]]),
    )
    for weights, kept in ((even, [0.0, 2.5]), (uneven, [0.0, 0.2])):
        route = told(2, [1.0, 1.0, 1.0], dropped="truncate")
        route.choose(0, Choice(scores([0, 1], [1, 2], [0, 1]), 2))
        found = route.substitute(0, index, weights)[1]
        assert sorted(found[1].tolist()) == pytest.approx(kept)
        assert torch.equal(found[0], weights[0])


@pytest.mark.parametrize("dropped", ["substitute", "truncate"])
def test_a_token_whose_groups_have_nothing_of_the_set_goes_without(dropped: str) -> None:
    """And never gets what its family has hidden from it."""
    rows = scores([0, 1], [0, 1], [5, 4])
    rows[:2, 3:] = rows[2, :3] = float("-inf")
    assert taken(told(2, [1.0, 1.0, 0.1], dropped=dropped), rows) == [{0, 1}, {0, 1}, set()]
    found = taken(told(3, [1.0, 1.0, 0.1], dropped=dropped), rows)
    assert found[:2] == [{0, 1}, {0, 1}]
    assert found[2] <= {5}


def test_null_experts_and_weights_that_are_no_numbers() -> None:
    """Unseen: a choice beyond the experts stays as it is, and no number becomes no weight where it is dropped."""
    index = torch.tensor([[1, 7], [2, 6], [1, 2], [4, 1]])
    weights = torch.tensor([[0.6, 0.4], [0.3, 0.7], [0.5, float("nan")], [float("nan"), 0.9]])
    route = told(1, [1.0, 1.0, 1.0, 1.0])
    found, weighed = route.substitute(0, index, weights)
    assert found.tolist() == [[1, 7], [1, 6], [1, 1], [1, 1]]
    assert weighed.tolist() == [
        [pytest.approx(0.6), pytest.approx(0.4)], [0.0, pytest.approx(0.7)], [0.5, 0.0], [0.0, pytest.approx(0.9)]
    ]  # fmt: skip
    assert vars(route._totals) == {"budget_choices": 4, "budget_dropped": 1}, "who has no weight was not chosen"
