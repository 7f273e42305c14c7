from __future__ import annotations

import math
import random

import pytest

from bench.support.policies.lru import BalancedLRU, GlobalLRU
from bench.support.policies.rivals import LRFU, BalancedLRFU
from bench.support.policies.trace import replay
from edgemoe.cache.record import ExpertId

A, B, C, D = (ExpertId(0, number) for number in range(4))


def anything(expert: ExpertId) -> bool:
    return True


def used(policy: LRFU, *experts: ExpertId) -> LRFU:
    """Uses each expert in a pass of its own."""
    for expert in experts:
        policy.requested(expert.layer, [expert.number])
        if expert in policy._resident:
            policy.used(expert)
        else:
            policy.inserted(expert)
    return policy


def random_trace(seed: int) -> list[list[ExpertId]]:
    draw = random.Random(seed)
    return [[ExpertId(time % 3, number) for number in draw.sample(range(6), 2)] for time in range(300)]


@pytest.mark.parametrize("seed", range(5))
def test_a_half_life_of_nothing_is_lru(seed: int) -> None:
    trace = random_trace(seed)
    for slots in (2, 5, 9):
        # The layers' passes alternate, so counting passes per layer can only change the order within a pass.
        assert replay(trace, BalancedLRFU(3, slots, 1e-2), slots) == replay(trace, BalancedLRU(3, slots), slots)
    one_layer = [entry for entry in trace if entry[0].layer == 0]
    assert replay(one_layer, LRFU(1e-2), 3) == replay(one_layer, GlobalLRU(), 3)


def test_without_end_uses_are_counted() -> None:
    policy = used(LRFU(math.inf), A, A, A, B, B, C)
    assert policy.victim(0, anything) == C
    assert policy.victim(0, lambda expert: expert != C) == B
    policy.removed(C)
    assert used(policy, C, C).victim(0, anything) == B, "evicted experts keep their count; ties are broken by LRU"
    assert policy.victim(0, lambda expert: False) is None


def test_a_use_counts_half_a_half_life_later() -> None:
    policy = used(LRFU(2), A, A, B, C, D)
    counts = {A: (1 + 0.5**0.5) * 0.5**1.5, B: 0.5, C: 0.5**0.5, D: 1.0}
    assert {expert: policy._count(expert) for expert in counts} == pytest.approx(counts)
    assert policy.victim(0, anything) == B
    policy.requested(1, [0])
    assert policy._count(D) == 1.0, "passes of other layers are not counted"


def test_equal_shares_hold_for_counts_too() -> None:
    policy = BalancedLRFU(2, 4, math.inf)
    for layer, numbers in ((0, (0, 0, 1)), (1, (0, 1, 1))):
        for number in numbers:
            policy.requested(layer, [number])
        for number in (0, 1):
            policy.inserted(ExpertId(layer, number))
    assert policy.victim(0, anything) == (0, 1)
    assert policy.victim(1, anything) == (1, 0)
