from __future__ import annotations

import random

import pytest

from bench.support.policies.lru import BalancedLRU, GlobalLRU, ReferenceLRU
from bench.support.policies.rivals import LRFU, BalancedLRFU
from edgemoe.cache.eviction.policy import EvictionPolicy
from edgemoe.cache.record import ExpertId

POLICIES = [GlobalLRU, ReferenceLRU, lambda: BalancedLRU(3, 6), lambda: LRFU(4), lambda: BalancedLRFU(3, 6, 4)]


def anything(expert: ExpertId) -> bool:
    return True


@pytest.mark.parametrize("seed", range(20))
def test_global_lru_chooses_as_the_reference_on_random_traces_with_random_pins(seed: int) -> None:
    draw = random.Random(seed)
    everyone = [ExpertId(layer, number) for layer in range(3) for number in range(6)]
    fast, plain = GlobalLRU(), ReferenceLRU()
    both: tuple[EvictionPolicy, ...] = (fast, plain)
    resident: list[ExpertId] = []
    for _ in range(400):
        expert = draw.choice(everyone)
        if expert in resident:
            for policy in both:
                policy.used(expert)
        else:
            if len(resident) == 7:
                pinned = set(draw.sample(resident, draw.randint(0, 7)))
                chosen = [policy.victim(expert.layer, lambda one: one not in pinned) for policy in both]  # noqa: B023
                assert chosen[0] == chosen[1]
                if chosen[0] is None:
                    assert pinned == set(resident)
                    continue
                for policy in both:
                    policy.removed(chosen[0])
                resident.remove(chosen[0])
            for policy in both:
                policy.inserted(expert)
            resident.append(expert)


@pytest.mark.parametrize("make", POLICIES)
def test_the_least_recently_used_leaves_and_asking_changes_nothing(make: type[EvictionPolicy]) -> None:
    policy = make()
    a, b, c = (ExpertId(0, number) for number in range(3))
    for expert in (a, b, c):
        policy.inserted(expert)
    policy.used(a)
    assert [policy.victim(0, anything) for _ in range(3)] == [b, b, b]
    assert policy.victim(0, lambda expert: expert != b) == c
    policy.removed(b)
    assert policy.victim(0, anything) == c
    policy.inserted(b)
    assert policy.victim(0, lambda expert: expert != c) == a


@pytest.mark.parametrize("make", POLICIES)
def test_nothing_evictable_gives_none(make: type[EvictionPolicy]) -> None:
    policy = make()
    assert policy.victim(0, anything) is None
    policy.inserted(ExpertId(0, 0))
    assert policy.victim(0, lambda expert: False) is None


def filled(layers: int, slots: int, held: list[int]) -> BalancedLRU:
    """A policy whose layers hold `held[layer]` experts, inserted in the order of their numbers."""
    policy = BalancedLRU(layers, slots)
    for layer, count in enumerate(held):
        for number in range(count):
            policy.inserted(ExpertId(layer, number))
    return policy


def test_a_layer_at_its_share_evicts_its_own_coldest() -> None:
    policy = filled(2, 8, [4, 4])
    assert policy.victim(0, anything) == (0, 0)
    assert policy.victim(1, anything) == (1, 0)


def test_a_layer_below_its_share_takes_from_the_fullest() -> None:
    policy = filled(3, 9, [1, 2, 6])
    assert policy.victim(0, anything) == (2, 0)
    assert policy.victim(1, anything) == (2, 0)
    assert policy.victim(2, anything) == (2, 0)


def test_a_full_layer_whose_own_are_pinned_takes_from_the_next_fullest() -> None:
    policy = filled(3, 9, [3, 4, 2])
    assert policy.victim(0, lambda expert: expert.layer != 0) == (1, 0)
    assert policy.victim(1, lambda expert: expert.layer == 2) == (2, 0)


def test_shares_that_are_no_whole_numbers_let_a_layer_fill_up_to_them() -> None:
    policy = filled(2, 5, [2, 3])
    assert policy.victim(0, anything) == (1, 0), "2 are below 2.5, so layer 0 may grow"
    policy = filled(2, 5, [3, 2])
    assert policy.victim(0, anything) == (0, 0), "3 are above it"


def test_removing_lowers_a_layers_share_again() -> None:
    policy = filled(2, 4, [2, 2])
    policy.removed(ExpertId(0, 0))
    policy.inserted(ExpertId(1, 9))
    assert policy.victim(0, anything) == (1, 0)


def test_a_long_prefill_leaves_every_layer_its_share() -> None:
    """One global order would give all slots to the last layers, which is the reason for this policy."""
    slots, layers, experts = 12, 4, 8
    policy, resident = BalancedLRU(layers, slots), set[ExpertId]()
    for layer in range(layers):
        for number in range(experts):
            if len(resident) == slots:
                leaving = policy.victim(layer, anything)
                assert leaving is not None
                policy.removed(leaving)
                resident.remove(leaving)
            expert = ExpertId(layer, number)
            policy.inserted(expert)
            resident.add(expert)
    assert [sum(expert.layer == layer for expert in resident) for layer in range(layers)] == [3, 3, 3, 3]
    assert resident == {ExpertId(layer, number) for layer in range(layers) for number in range(5, 8)}
