"""A budget on the tokens of a layer, by hand: whole passes and their parts, bytes, and odd choices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from edgemoe.cache import ExpertId
from edgemoe.experts.budget_routing import BudgetRouting, BudgetTotals
from edgemoe.experts.router_hook import Choice
from edgemoe.prefetch.budget import Budget, Unit


class Store:
    """The part of a store that routing uses."""

    @staticmethod
    def record_nbytes(expert: ExpertId) -> int:
        return 100


class Residents:
    """The part of a cache that routing uses."""

    store = Store()

    def __init__(self, residents: Sequence[int], experts: Sequence[int]) -> None:
        self._residents = [[number for number in residents if number < count] for count in experts]

    def residents(self, layer: int) -> list[int]:
        return self._residents[layer]


def budgeted(
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
    """Probabilities that halve from the first of each token's `wanted` experts to the last."""
    rows = torch.full((len(wanted), experts), 0.01)
    for token, order in enumerate(wanted):
        for place, expert in enumerate(order):
            rows[token, expert] = 0.5 ** (place + 1)
    return rows


def taken(route: BudgetRouting, rows: torch.Tensor, layer: int = 0, top_k: int = 2) -> list[set[int]]:
    """The experts that each token computes when its router scores `rows` and gives each choice the weight 1."""
    index = route.choose(layer, Choice(rows, top_k)).topk(top_k).indices
    index, weights = route.substitute(layer, index, torch.ones(index.shape))
    return [{int(e) for e, w in zip(*pair, strict=True) if w} for pair in zip(index, weights, strict=True)]


def test_each_part_of_a_pass_gets_its_share_of_the_budget() -> None:
    """Sequences that call a layer one after the other keep to the budget together."""
    route = budgeted(2, [1.0, 1.0, 0.0, 1.0, 1.0])
    assert taken(route, scores([0, 1], [0, 1])) == [{0}, {0}], "half of two"
    assert taken(route, scores([4, 5])) == [{4, 5}], "a plain step"
    assert taken(route, scores([2, 3], [2, 3])) == [{2, 0}, {2, 0}], "one more, and those allowed before"
    whole = budgeted(2, [1.0, 1.0, 1.0, 1.0])
    assert taken(whole, scores([0, 1], [0, 1], [2, 0], [2, 0])) == [{0, 2}] * 4, "in one part, all of it for all"


def test_experts_of_a_plain_step_are_free_for_the_tokens_verified_beside_and_after_it() -> None:
    together = budgeted(1, [0.0, 1.0], rule="residency")
    assert taken(together, scores([4, 5], [0, 4])) == [{4, 5}, {0, 4}]
    apart = budgeted(1, [0.0, 1.0], rule="residency")
    assert taken(apart, scores([4, 5])) == [{4, 5}]
    assert taken(apart, scores([0, 4])) == [{0, 4}]
    by_path = budgeted(1, [0.0, 1.0], rule="path")
    assert taken(by_path, scores([4, 5], [0, 4])) == [{4, 5}, {0}], "the paper's set counts every expert in it"


def test_layers_share_bytes_equally_and_unused_bytes_go_to_the_layers_after() -> None:
    route = budgeted(650, [1.0], Unit.NBYTES, experts=(6, 4, 6), residents=[0])
    # 650 / 3 pays for two, 450 / 2 for two, and 250 for two of the last one's three.
    assert taken(route, scores([5, 4, 3]), 0, 3) == [{5, 4}]
    assert taken(route, scores([3, 2, 1], experts=4), 1, 3) == [{3, 2}]
    assert taken(route, scores([5, 4, 3]), 2, 3) == [{5, 4}]
    route = budgeted(650, [1.0], Unit.NBYTES, rule="residency", experts=(6, 4, 6), residents=[5, 3])
    assert taken(route, scores([5, 3, 1]), 0, 3) == [{5, 3, 1}], "one is loaded"
    assert taken(route, scores([3, 2, 1], experts=4), 1, 3) == [{3, 2, 1}], "two of 550 / 2"
    assert taken(route, scores([2, 1, 0]), 2, 3) == [{2, 1, 0}], "and 350 pay for three"


def test_a_budget_below_one_record_allows_resident_experts_only() -> None:
    for dropped in ("substitute", "truncate"):
        route = budgeted(50, [1.0, 1.0], Unit.NBYTES, rule="residency", residents=[1, 4, 5], dropped=dropped)
        rows = scores([0, 2], [0, 4])
        rows[0, 5] = 0.1
        assert taken(route, rows)[1] >= {4}
        assert all(
            each <= {1, 4, 5} for each in taken(budgeted(50, [1.0, 1.0], Unit.NBYTES, "residency", [1, 4, 5]), rows)
        )


def test_bytes_pay_for_the_records_of_each_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Store, "record_nbytes", staticmethod(lambda expert: 100 if expert.layer else 300))
    route = budgeted(800, [1.0, 1.0], Unit.NBYTES, experts=(6, 6))
    assert taken(route, scores([0, 1], [2, 3]), 0) == [{0}, {0}], "half of 800 pays for one record of 300"
    assert set().union(*taken(route, scores([0, 1], [2, 3]), 1)) == {0, 1, 2, 3}, "and 500 pay for five of 100"


def test_choices_and_dropped_choices_are_counted() -> None:
    route = budgeted(2, [1.0, 0.5, 0.0])
    taken(route, scores([0, 1], [1, 2], [3, 4]))
    assert vars(route._totals) == {"budget_choices": 4, "budget_dropped": 1}


def test_a_token_with_all_its_experts_in_the_set_changes_no_bit() -> None:
    route = budgeted(2, [1.0, 1.0, 1.0])
    index, weights = torch.tensor([[1, 0], [2, 1], [0, 1]]), torch.tensor([[0.7, 0.2], [0.3, 0.3], [0.1, 0.05]])
    rows = scores([0, 1], [1, 2], [0, 1])
    route.choose(0, Choice(rows, 2))
    found, weighed = route.substitute(0, index, weights)
    assert torch.equal(found[[0, 2]], index[[0, 2]])
    assert torch.equal(weighed[[0, 2]], weights[[0, 2]])
    assert weighed[1].tolist() == [0.0, pytest.approx(0.3)]


def test_normalised_weights_keep_their_sum_and_others_their_values() -> None:
    index = torch.tensor([[0, 1], [1, 2], [0, 3]])
    even, uneven = (
        torch.tensor([[1.5, 1.0], [2.0, 0.5], [1.25, 1.25]]),
        torch.tensor([[0.5, 0.4], [0.2, 0.1], [0.3, 0]]),
    )
    for weights, kept in ((even, [0.0, 2.5]), (uneven, [0.0, 0.2])):
        route = budgeted(2, [1.0, 1.0, 1.0], dropped="truncate")
        route.choose(0, Choice(scores([0, 1], [1, 2], [0, 1]), 2))
        found = route.substitute(0, index, weights)[1]
        assert sorted(found[1].tolist()) == pytest.approx(kept)
        assert torch.equal(found[0], weights[0])


@pytest.mark.parametrize("dropped", ["substitute", "truncate"])
def test_a_token_without_an_expert_of_the_set_in_its_groups_gets_none(dropped: str) -> None:
    """And never gets an expert that its family has hidden."""
    rows = scores([0, 1], [0, 1], [5, 4])
    rows[:2, 3:] = rows[2, :3] = float("-inf")
    assert taken(budgeted(2, [1.0, 1.0, 0.1], dropped=dropped), rows) == [{0, 1}, {0, 1}, set()]
    found = taken(budgeted(3, [1.0, 1.0, 0.1], dropped=dropped), rows)
    assert found[:2] == [{0, 1}, {0, 1}]
    assert found[2] <= {5}


def test_null_experts_and_nan_weights() -> None:
    """Of a router without `topk`: an index beyond the experts is kept, and NaN becomes 0 where a choice is dropped."""
    index = torch.tensor([[1, 7], [2, 6], [1, 2], [4, 1]])
    weights = torch.tensor([[0.6, 0.4], [0.3, 0.7], [0.5, float("nan")], [float("nan"), 0.9]])
    route = budgeted(1, [1.0, 1.0, 1.0, 1.0])
    found, weighed = route.substitute(0, index, weights)
    assert found.tolist() == [[1, 7], [1, 6], [1, 1], [1, 1]]
    assert weighed.tolist() == [
        [pytest.approx(0.6), pytest.approx(0.4)], [0.0, pytest.approx(0.7)], [0.5, 0.0], [0.0, pytest.approx(0.9)]
    ]  # fmt: skip
    assert vars(route._totals) == {"budget_choices": 4, "budget_dropped": 1}, "an expert of weight 0 is not chosen"
