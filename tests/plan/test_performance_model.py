from __future__ import annotations

from dataclasses import replace

import pytest

from edgemoe.plan.moesd import tokens_per_cycle
from edgemoe.plan.performance_model import MIN_COST, Locality, MachineSpeed, Routing
from tests.support.profiles import known_model


def test_a_plain_step_by_hand() -> None:
    model = known_model()
    # The knee is at 0.5 * 300/50 = 3 tokens: G(1) = 1.5, and each of the 4 experts per layer gets one token.
    assert model.step_seconds(1) == pytest.approx(0.002 + 4 * 0.003 + 1.5 * 0.002 + 1.5 * 0.001)


def test_misses_lengthen_a_pass_by_the_exposed_share_of_their_link_time() -> None:
    model = known_model()
    # 24 experts, a quarter of them missing: 6 records of 14 MB at 4 GB/s take 21 ms.
    more = model.step_seconds(1, hit_rate=0.75) - model.step_seconds(1)
    assert more == pytest.approx(0.7 * 0.021)


def test_a_pass_is_never_shorter_than_its_links_time() -> None:
    slow = replace(known_model(), speed=MachineSpeed(memory=50e9, arithmetic=300e9, link=0.1e9))
    assert slow.step_seconds(1, hit_rate=0.75) == pytest.approx(6 * 14e6 / 0.1e9)


def test_bulk_passes_have_parameters_of_their_own() -> None:
    model = known_model(bulk_from=129)
    activated = model.activated(32, 5)
    assert model.step_seconds(32, 5) == pytest.approx(0.15 + 0.003 * activated + 160 * 0.0009)
    more = model.step_seconds(32, 5, hit_rate=0.5) - model.step_seconds(32, 5)
    assert more == pytest.approx(0.4 * 3 * activated * 14e6 / 4e9)
    assert known_model(bulk_from=0).step_seconds(32, 5) > 1.2 * model.step_seconds(32, 5)


def test_the_ridge_is_where_arithmetic_takes_as_long_as_reading() -> None:
    # A weight of two bytes takes 2/50 ns to read, and 2/300 ns of arithmetic per token.
    assert MachineSpeed(memory=50e9, arithmetic=300e9, link=1).ridge(2) == pytest.approx(6)
    assert MachineSpeed(memory=50e9, arithmetic=300e9, link=1).ridge(4) == pytest.approx(12)


def test_tokens_with_similar_routing_share_experts() -> None:
    alike, even = Routing(32, among=1.0, within=0.5), Routing(32, among=1.0, within=1.0)
    assert alike.activated(4, 1, 1) == pytest.approx(4)
    assert alike.activated(4, 1, 4) == pytest.approx(even.activated(4, 1, 2)) == pytest.approx(7.5)
    assert alike.activated(4, 2, 4) == pytest.approx(even.activated(4, 4, 1))


def test_hit_rates_are_between_those_of_few_and_of_all_experts() -> None:
    locality = Locality(few=3, all=1)
    assert locality.hit_rate(0.5, 0.0) == pytest.approx(0.875)
    assert locality.hit_rate(0.5, 0.5) == pytest.approx(0.75)
    assert locality.hit_rate(0.5, 1.0) == pytest.approx(0.5)
    assert known_model().hit_rate(1.0, 64, 9) == 1


def test_speedup_is_tokens_over_the_cycles_time_in_plain_steps() -> None:
    model = known_model()
    cycle = model.step_seconds(4, 4) + (1e-4 + 4 * 5e-5) + (5e-5 + 4 * 4e-5)
    assert model.cycle_seconds(4, 3) == pytest.approx(cycle)
    assert model.speedup(4, 3, 2.5) == pytest.approx(2.5 * model.step_seconds(4) / cycle)
    assert model.tokens_per_second(4, gamma=3, tokens=2.5) == pytest.approx(4 * 2.5 / cycle)
    assert model.tokens_per_second(4) == pytest.approx(4 / model.step_seconds(4))
    assert model.target_efficiency(4, 3) == pytest.approx(model.step_seconds(4) / model.step_seconds(4, 4))


def test_verifications_may_miss_more_than_plain_steps() -> None:
    model = known_model()
    assert model.speedup(1, 3, 2.0, 0.9, 0.6) < model.speedup(1, 3, 2.0, 0.9) < model.speedup(1, 3, 2.0, 0.9, 1.0)


def test_one_more_token_costs_a_share_of_a_step_that_falls_with_the_batch() -> None:
    model = known_model()
    plain = model.step_seconds(1)
    assert model.token_cost(1) == pytest.approx((model.step_seconds(1, 2) - plain) / plain)
    costs = [model.token_cost(batch) for batch in (1, 4, 16, 64)]
    assert costs == sorted(costs, reverse=True)
    assert all(cost > MIN_COST / batch for cost, batch in zip(costs, (1, 4, 16, 64), strict=True))


def test_the_cost_of_one_more_token_is_positive_even_where_a_bulk_pass_is_faster() -> None:
    model = known_model(bulk_from=129)
    faster = replace(model, times=replace(model.times, bulk_bias=0.01, bulk_token=1e-4))
    assert faster.step_seconds(128, 1 + 1 / 128) < faster.step_seconds(128)
    assert faster.token_cost(128) == pytest.approx(MIN_COST / 128)


def test_an_outlook_agrees_with_the_single_predictions() -> None:
    model = known_model()
    found = model.outlook(4, 0.5, 0.7, (3, 8))
    rates = [model.hit_rate(0.5, 4, tokens) for tokens in (1, 4, 9)]
    assert (found.batch, found.experts, found.hit_rate) == (4, model.activated(4), rates[0])
    assert found.tokens_per_second == model.tokens_per_second(4, rates[0])
    assert found.drafts[0].speedup == model.speedup(4, 3, tokens_per_cycle(0.7, 3), rates[0], rates[1])
    # A verification requests more experts than a plain step, and misses more of them.
    assert rates[2] < rates[1] < rates[0]
    expected = model.step_seconds(4, 1, rates[0]) / model.step_seconds(4, 9, rates[2])
    assert found.drafts[1].target_efficiency == pytest.approx(expected)
    assert [each.drafted for each in found.drafts] == [3, 8]
