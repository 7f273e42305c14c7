"""Allowed experts by hand: three rules, three units, and their boundary cases."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from edgemoe.prefetch.budget import RULES, Budget, Demand, Unit, allowed_experts

PROBABILITIES = torch.tensor(
    [
        [0.5, 0.25, 0.125, 0.0625, 0.0625],
        [0.0625, 0.25, 0.125, 0.5, 0.0625],
        [0.0625, 0.0625, 0.25, 0.125, 0.5],
    ]
)
CHOSEN = torch.tensor([[1, 1, 0, 0, 0], [0, 1, 0, 1, 0], [0, 0, 1, 0, 1]], dtype=torch.bool)
CERTAIN = torch.tensor([1.0, 0.5, 0.25])
"""Scores by sum: 0.625, 0.5625, 0.5, 0.6875, 0.625. By path: 0.546875, 0.390625, 0.25, 0.34375, 0.21875."""
NOBODY: list[int] = []


def demand(rule: str = "path") -> Demand:
    return Demand(PROBABILITIES, CHOSEN, Budget(Unit.EXPERTS, 1, rule).importance(CERTAIN))


def chosen(
    rule: str, max_counted: int, free: list[int] = NOBODY, of: Demand | None = None, unit: Unit = Unit.EXPERTS
) -> list[int]:
    """The experts allowed by a budget of `max_counted` experts."""
    given = of or demand(rule)
    mask = torch.zeros(len(given.requested), dtype=torch.bool)
    mask[free] = True
    return numbers(allowed_experts(Budget(unit, 99, rule), given, mask, max_counted))


def by_share(rule: str, share: float, free: list[int] = NOBODY, of: Demand | None = None) -> list[int]:
    """The experts allowed by a budget of `share` of the weight."""
    given = of or demand(rule)
    mask = torch.zeros(len(given.requested), dtype=torch.bool)
    mask[free] = True
    return numbers(allowed_experts(Budget(Unit.MASS, share, rule), given, mask, 0))


def numbers(allowed: torch.Tensor) -> list[int]:
    assert allowed.dtype == torch.bool
    return [int(number) for number in allowed.nonzero()[:, 0]]


def one_node(*taken: float) -> Demand:
    """One node with the given router probabilities that chose every expert with probability above 0."""
    probabilities = torch.tensor([taken])
    return Demand(probabilities, probabilities > 0, torch.ones(1))


def test_what_a_demand_sums_up() -> None:
    plain, weighed = demand("sum"), demand("path")
    assert plain.scores.tolist() == [0.625, 0.5625, 0.5, 0.6875, 0.625]
    assert weighed.scores.tolist() == [0.546875, 0.390625, 0.25, 0.34375, 0.21875]
    # Each node gives its two experts the weights 2/3 and 1/3.
    assert plain.expert_weights.tolist() == pytest.approx([2 / 3, 2 / 3, 1 / 3, 2 / 3, 2 / 3])
    assert weighed.expert_weights.tolist() == pytest.approx([2 / 3, 1 / 3 + 1 / 6, 1 / 12, 1 / 3, 1 / 6])
    assert plain.requested.tolist() == [True] * 5
    assert torch.equal(demand("residency").scores, plain.scores)


# --- a number of experts -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "sets"),
    [
        ("sum", [[3], [0, 3], [0, 3, 4], [0, 1, 3, 4], [0, 1, 2, 3, 4]]),
        ("path", [[0], [0, 1], [0, 1, 3], [0, 1, 2, 3], [0, 1, 2, 3, 4]]),
        ("residency", [[3], [0, 3], [0, 3, 4], [0, 1, 3, 4], [0, 1, 2, 3, 4]]),
    ],
)
def test_the_best_are_kept(rule: str, sets: list[list[int]]) -> None:
    assert [chosen(rule, max_counted) for max_counted in range(1, 6)] == sets
    assert chosen(rule, 99) == sets[-1]
    assert [chosen(rule, max_counted, unit=Unit.NBYTES) for max_counted in range(1, 6)] == sets


@pytest.mark.parametrize("rule", RULES)
def test_of_equals_the_first_are_kept(rule: str) -> None:
    even = one_node(0.25, 0.25, 0.25, 0.25)
    assert [chosen(rule, max_counted, of=even) for max_counted in (1, 2, 3)] == [[0], [0, 1], [0, 1, 2]]
    assert by_share(rule, 0.5, of=even) == [0, 1]


def test_the_papers_rule_counts_whom_nobody_chose_and_residency_does_not() -> None:
    """Each node chose one expert; expert 1 is the second of both."""
    probabilities = torch.tensor([[0.5, 0.375, 0.125, 0.0], [0.0, 0.375, 0.125, 0.5]])
    given = Demand(probabilities, probabilities == 0.5, torch.ones(2))
    assert chosen("sum", 2, of=given) == [0, 1]
    assert chosen("path", 1, of=given) == [1]
    assert chosen("residency", 1, of=given) == [0]
    assert chosen("residency", 4, of=given) == [0, 3]
    assert [chosen(rule, 0, of=given) for rule in RULES] == [[0], [0], [0]]


def test_what_is_free_does_not_count() -> None:
    assert chosen("residency", 1, free=[4, 2]) == [2, 3, 4]
    assert chosen("residency", 1, free=[0, 4]) == [0, 3, 4]
    assert chosen("residency", 2, free=[0, 4]) == [0, 1, 3, 4]
    assert chosen("residency", 0, free=[4]) == [4]
    # In a pass of several parts, the experts that earlier parts were allowed are free.
    assert chosen("sum", 1, free=[2]) == [2, 3]


def test_what_is_free_is_allowed_whether_anybody_chose_it_or_not() -> None:
    given = one_node(0.75, 0.25, 0.0)
    assert chosen("residency", 1, free=[2], of=given) == [0, 2]
    assert chosen("residency", 0, free=[2], of=given) == [2]


@pytest.mark.parametrize(("rule", "first"), [("sum", 3), ("path", 0), ("residency", 3)])
@pytest.mark.parametrize("max_counted", [0, -1])
def test_where_nothing_is_paid_for_the_most_wanted_one_is(rule: str, first: int, max_counted: int) -> None:
    assert chosen(rule, max_counted) == [first]
    assert chosen(rule, max_counted, free=[2]) == [2]


@pytest.mark.parametrize("rule", RULES)
def test_where_nothing_is_wanted_there_may_be_nobody(rule: str) -> None:
    given = Demand(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool), torch.ones(2))
    assert chosen(rule, 0, of=given) == []


# --- a share of the weight -----------------------------------------------------------------------


def test_a_share_takes_as_few_as_hold_it() -> None:
    given = one_node(0.5, 0.25, 0.125, 0.0625, 0.0625)
    for rule in RULES:
        assert by_share(rule, 1e-9, of=given) == [0]
        assert by_share(rule, 0.49, of=given) == [0]
        assert by_share(rule, 0.5, of=given) == [0], "the bound itself is enough"
        assert by_share(rule, 0.51, of=given) == [0, 1]
        assert by_share(rule, 0.75, of=given) == [0, 1]
        assert by_share(rule, 0.76, of=given) == [0, 1, 2]
        assert by_share(rule, 0.9375, of=given) == [0, 1, 2, 3]


def test_the_mass_is_what_was_taken_and_not_what_was_probable() -> None:
    """In the order of their scores, experts 3, 0, 4, 1, 2 have weights of 2/3 each (the last 1/3) of 3."""
    assert [by_share("sum", share) for share in (0.2, 0.4, 0.6, 0.8, 0.95)] == [
        [3], [0, 3], [0, 3, 4], [0, 1, 3, 4], [0, 1, 2, 3, 4],
    ]  # fmt: skip
    # By path the cumulative weights are 0.6667, 1.1667, 1.5, 1.5833 and 1.75 of 1.75.
    assert [by_share("path", share) for share in (0.38, 0.66, 0.85, 0.9, 0.91)] == [
        [0], [0, 1], [0, 1, 3], [0, 1, 2, 3], [0, 1, 2, 3, 4],
    ]  # fmt: skip


def test_what_is_free_has_its_share_of_the_mass_first() -> None:
    given = one_node(0.5, 0.25, 0.125, 0.0625, 0.0625)
    assert by_share("residency", 0.1, free=[2], of=given) == [2]
    assert by_share("residency", 0.125, free=[2], of=given) == [2]
    assert by_share("residency", 0.126, free=[2], of=given) == [0, 2]
    assert by_share("residency", 0.7, free=[0, 1], of=given) == [0, 1]
    assert by_share("residency", 0.8, free=[0, 1], of=given) == [0, 1, 2]


@pytest.mark.parametrize("rule", RULES)
def test_all_of_the_mass_is_everybody_who_was_chosen_however_little(rule: str) -> None:
    """Float32 sums would lose the smallest weights."""
    given = one_node(0.5, 0.5, 1e-20, 1e-44, 0.0)
    assert by_share(rule, 1.0, of=given) == [0, 1, 2, 3]
    assert by_share(rule, 1.0, free=[4], of=given) == [0, 1, 2, 3, 4]


def test_residency_moves_nobody_whom_no_one_chose() -> None:
    given = one_node(0.5, 0.5, 0.0, 0.0)
    assert by_share("residency", 0.999, of=given) == [0, 1]


# --- random budgets ------------------------------------------------------------------------------


def naive(unit: Unit, rule: str, amount: float, given: Demand, free: set[int], max_counted: int) -> set[int]:
    """A plain `allowed_experts`, which adds one expert at a time."""
    scores, requested = given.scores.tolist(), given.requested.tolist()
    order = sorted(set(range(len(scores))) - free, key=lambda expert: (-scores[expert], expert))
    if rule == "residency":
        order = [expert for expert in order if requested[expert]]
    if unit is Unit.MASS and rule == "residency":
        return naive_covering(amount, given.topk_weights.tolist(), free)
    found, mass = set(free), sum(float(given.expert_weights[expert]) for expert in free)
    for expert in order:
        if unit is Unit.MASS and mass >= amount * float(given.expert_weights.sum()):
            break
        if unit is not Unit.MASS and len(found - free) >= max_counted:
            break
        found.add(expert)
        mass += float(given.expert_weights[expert])
    return found or {expert for expert in order if requested[expert]} and {next(e for e in order if requested[e])}


def naive_covering(amount: float, shares: list[list[float]], free: set[int]) -> set[int]:
    """Adds the expert with the largest gain until every node has its share."""
    found = set(free)

    def lacking(node: list[float]) -> float:
        return max(0.0, amount - sum(node[expert] for expert in found))

    while any(lacking(node) > 1e-6 for node in shares):
        helps = {
            expert: sum(min(node[expert], lacking(node)) + 1e-3 * node[expert] for node in shares)
            for expert in range(len(shares[0]))
            if expert not in found
        }
        found.add(max(helps, key=lambda expert: helps[expert]))
    return found


def test_every_node_keeps_its_share_where_what_is_resident_is_free() -> None:
    """However unlikely a node is to be committed, since the reply may continue from it."""
    generator = torch.Generator().manual_seed(11)
    for trial in range(60):
        probabilities = torch.randn(5, 12, generator=generator).mul(2).softmax(-1)
        top = torch.zeros(5, 12, dtype=torch.bool).scatter(1, probabilities.topk(4).indices, True)
        free = torch.rand(12, generator=generator) < 0.3
        budget = Budget(Unit.MASS, 0.5 + 0.49 * (trial % 10) / 10, "residency")
        given = Demand(probabilities, top, budget.importance(torch.rand(5, generator=generator)))
        allowed = allowed_experts(budget, given, free, 0)
        kept = (given.topk_weights * allowed).sum(1)
        assert (kept >= budget.amount - 1e-5).all()
        assert not bool((allowed & ~free & ~given.requested).any())


@pytest.mark.parametrize(("unit", "rule"), list(product(Unit, RULES)))
def test_sets_are_those_of_a_naive_computation(unit: Unit, rule: str) -> None:
    generator = torch.Generator().manual_seed(5)
    for trial in range(40):
        nodes, experts = 1 + trial % 7, 4 + trial % 9
        probabilities = torch.randn(nodes, experts, generator=generator).mul(2).softmax(-1)
        top = torch.zeros(nodes, experts, dtype=torch.bool).scatter(1, probabilities.topk(2).indices, True)
        budget = Budget(unit, (trial % 10) / 10 + 0.05, rule)
        path_probabilities = torch.rand(nodes, generator=generator) + 0.01
        given = Demand(probabilities, top, budget.importance(path_probabilities))
        free = torch.rand(experts, generator=generator) < 0.3
        found = allowed_experts(budget, given, free, trial % 5)
        expected = naive(unit, rule, budget.amount, given, set(numbers(free)), trial % 5)
        assert set(numbers(found)) == expected, trial
