"""Demand and bins by hand."""

from __future__ import annotations

import pytest
import torch

from edgemoe.prefetch.forecast import BINS, EDGES, MIN_DEMAND, Forecast


def bin_of(demand: float) -> int:
    """The plain form: the number of edges at or below `demand`."""
    return sum(float(edge) <= demand for edge in EDGES)


def bins_after(*demand: float) -> dict[int, int]:
    """The bins of experts after one node with path probability 1 and these routing weights."""
    forecast = Forecast([len(demand)])
    forecast.add(0, torch.tensor([demand]), torch.ones(1))
    return forecast.bins(0)


def test_nothing_is_named_before_anything_was_drafted() -> None:
    forecast = Forecast([4, 2])
    assert [forecast.bins(0), forecast.bins(1)] == [{}, {}]


def test_an_amount_is_the_sum_over_nodes_of_path_probability_times_share() -> None:
    forecast = Forecast([5])
    weights = torch.tensor([[0.5, 0.5, 0, 0, 0], [0, 0.25, 0.75, 0, 0]])
    forecast.add(0, weights, torch.tensor([1.0, 0.5]))
    assert forecast.bins(0) == {0: bin_of(0.5), 1: bin_of(0.625), 2: bin_of(0.375)}
    forecast.add(0, torch.tensor([[0.0, 0.0, 0.0, 1.0, 0.0]]), torch.tensor([0.0625]))
    forecast.add(0, torch.tensor([[0.0, 0.0, 1.0, 0.0, 0.0]]), torch.tensor([1.0]))
    assert forecast.bins(0) == {0: bin_of(0.5), 1: bin_of(0.625), 2: bin_of(1.375), 3: bin_of(0.0625)}


def test_layers_are_apart_and_may_have_different_numbers_of_experts() -> None:
    forecast = Forecast([2, 3, 1])
    forecast.add(1, torch.tensor([[0.0, 0.0, 1.0]]), torch.ones(1))
    forecast.add(2, torch.tensor([[0.5]]), torch.ones(1))
    assert [forecast.bins(layer) for layer in range(3)] == [{}, {2: bin_of(1.0)}, {0: bin_of(0.5)}]


def test_bins_begin_at_their_edges() -> None:
    edges = EDGES.tolist()
    assert len(edges) + 1 == BINS
    assert bins_after(*edges) == {number: number + 1 for number in range(len(edges))}
    assert bins_after(*(edge * 0.999 for edge in edges)) == {number: number for number in range(len(edges))}
    assert bins_after(1000.0) == {0: BINS - 1}


def test_edges_rise_and_what_is_too_little_is_not_named() -> None:
    assert EDGES.tolist() == sorted(set(EDGES.tolist()))
    assert float(EDGES[0]) > MIN_DEMAND
    assert bins_after(MIN_DEMAND * 1.01, MIN_DEMAND * 0.99, 0.0) == {0: 0}


def test_news_are_the_greatest_shares_that_nobody_wanted_before() -> None:
    forecast = Forecast([5, 5])
    weights = torch.tensor([[0.5, 0.3, 0.2, 0, 0], [0, 0, 0, 1.0, 0]])
    expected = [[True, True, False, False, False], [False, False, False, True, False]]
    for _ in range(2):
        assert forecast.new_experts(0, weights, 2).tolist() == expected, "an expert of weight 0 is not new"
    forecast.add(0, torch.tensor([[0.0, 0.9, 0.0, MIN_DEMAND / 2, 0.0]]), torch.ones(1))
    assert forecast.new_experts(0, weights, 2).tolist() == [[True, False, False, False, False], expected[1]]
    assert forecast.new_experts(1, weights, 2).tolist() == expected
    assert forecast.new_experts(1, weights, 9).sum(1).tolist() == [3, 1]


def test_bins_are_plain_numbers() -> None:
    assert {type(each) for pair in bins_after(0.5).items() for each in pair} == {int}


@pytest.mark.parametrize("seed", range(3))
def test_random_amounts_are_as_a_plain_loop_finds_them(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    forecast, demand = Forecast([16]), [0.0] * 16
    for nodes in (1, 4, 3):
        weights = torch.rand(nodes, 16, generator=generator) ** 4
        path_probabilities = torch.rand(nodes, generator=generator)
        forecast.add(0, weights, path_probabilities)
        for expert in range(16):
            demand[expert] += sum(float(weights[node, expert] * path_probabilities[node]) for node in range(nodes))
    assert all(abs(amount - float(edge)) > 1e-6 for amount in demand for edge in [*EDGES, MIN_DEMAND]), "a tie"
    assert forecast.bins(0) == {expert: bin_of(amount) for expert, amount in enumerate(demand) if amount >= MIN_DEMAND}
