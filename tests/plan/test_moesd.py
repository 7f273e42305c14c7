from __future__ import annotations

import math

import pytest

from edgemoe.plan import moesd


@pytest.mark.parametrize(
    ("experts", "top_k", "table"),
    [
        # N(t) at 1, 2, 4, 8, 16, 32 and 64 tokens, as published to one decimal.
        (64, 8, (8, 15, 26.5, 42, 56.4, 63.1, 64)),
        (128, 8, (8, 15.5, 29.1, 51.6, 82.4, 111.8, 125.9)),
        (8, 2, (2, 3.5, 5.5, 7.2, 7.9, 8, 8)),
    ],
)
def test_expected_experts_are_those_of_the_papers_models(experts: int, top_k: int, table: tuple[float, ...]) -> None:
    found = [moesd.expected_experts(experts, top_k, 2**power) for power in range(7)]
    assert found == pytest.approx(table, abs=0.051)


def test_a_dense_layer_activates_everything_at_once() -> None:
    assert moesd.expected_experts(8, 8, 1) == 8
    assert moesd.full_activation(8, 8) == 1
    assert moesd.tokens_per_expert(8, 5, activated=8) == 5


@pytest.mark.parametrize("top_k", [0, 9])
def test_top_k_must_be_within_the_experts_of_a_layer(top_k: int) -> None:
    with pytest.raises(ValueError, match=f"at most the 8 experts of a layer, not {top_k}"):
        moesd.expected_experts(8, top_k, 1)


def test_full_activation_by_hand() -> None:
    # 0.75^10 = 0.056 and 0.75^11 = 0.042: eleven tokens leave less than 5 % of the experts inactive.
    assert moesd.full_activation(8, 2) == 11
    assert moesd.full_activation(64, 8) == 23
    assert moesd.expected_experts(64, 8, 23) >= 0.95 * 64 > moesd.expected_experts(64, 8, 22)


def test_tokens_per_expert_by_hand() -> None:
    # Two tokens of Mixtral make 4 choices and activate 3.5 experts.
    assert moesd.tokens_per_expert(2, 2, moesd.expected_experts(8, 2, 2)) == pytest.approx(4 / 3.5)
    assert moesd.tokens_per_expert(8, 1, moesd.expected_experts(64, 8, 1)) == pytest.approx(1)
    # Many tokens activate every expert, and each expert gets rho * t of them.
    assert moesd.tokens_per_expert(8, 1000, moesd.expected_experts(64, 8, 1000)) == pytest.approx(125)


def test_growth_is_a_power_up_to_the_knee_and_then_its_tangent() -> None:
    assert moesd.growth(3, knee=4, base=2) == 8
    assert moesd.growth(4, knee=4, base=2) == 16
    assert moesd.growth(6, knee=4, base=2) == pytest.approx(16 * (1 + 2 * math.log(2)))
    before, after = (moesd.growth(4 + step, knee=4, base=1.5) for step in (-1e-6, 1e-6))
    at = moesd.growth(4, knee=4, base=1.5)
    assert (at - before) / 1e-6 == pytest.approx((after - at) / 1e-6, rel=1e-4)
    assert moesd.growth(100, knee=4, base=1) == 1


def test_tokens_of_a_cycle_by_hand() -> None:
    assert moesd.tokens_per_cycle(0.5, 2) == 1.75
    assert moesd.tokens_per_cycle(0.9, 4) == pytest.approx((1 - 0.9**5) / (1 - 0.9))
    assert moesd.tokens_per_cycle(0, 5) == 1
    assert moesd.tokens_per_cycle(1, 5) == 6
    with pytest.raises(ValueError, match=r"from 0 to 1, not 1\.5"):
        moesd.tokens_per_cycle(1.5, 2)


def test_speedup_by_hand() -> None:
    # 1.75 tokens in 2 + 12 + 1 ms, against one token in 10 ms.
    assert moesd.speedup(1.75, plain=10, draft=2, verify=12, reject=1) == pytest.approx(17.5 / 15)
    assert moesd.target_efficiency(10, 12.5) == 0.8
