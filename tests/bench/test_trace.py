from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from functools import cache

import pytest

from bench.support.policies.lru import BalancedLRU, GlobalLRU, ReferenceLRU
from bench.support.policies.rivals import LRFU
from bench.support.policies.trace import belady_misses, replay
from edgemoe.cache.eviction.hot_temporal import HotTemporal
from edgemoe.cache.eviction.policy import EvictionPolicy
from edgemoe.cache.record import ExpertId

A, B, C, D = (ExpertId(0, number) for number in range(4))
Steps = list[list[ExpertId]]


def one_by_one(text: str) -> Steps:
    return [[{"a": A, "b": B, "c": C, "d": D}[letter]] for letter in text]


def fewest_by_brute_force(trace: Steps, slots: int) -> int:
    """The minimum over all choices of victims. Of an entry that does not fit, any expert may stay."""

    @cache
    def fewest(time: int, resident: frozenset[ExpertId]) -> int:
        if time == len(trace):
            return 0
        needed = frozenset(trace[time])
        missing = needed - resident
        fixed = needed if len(needed) <= slots else frozenset()
        others = (resident | needed) - fixed
        kept = min(len(others), slots - len(fixed))
        after = [fixed | frozenset(chosen) for chosen in itertools.combinations(sorted(others), kept)]
        return len(missing) + min(fewest(time + 1, state) for state in after)

    return fewest(0, frozenset())


def random_trace(draw: random.Random, layers: int, experts: int, top_k: int, passes: int) -> Steps:
    return [
        [ExpertId(layer, number) for number in draw.sample(range(experts), draw.randint(1, top_k))]
        for _ in range(passes)
        for layer in range(layers)
    ]


@pytest.mark.parametrize(
    ("letters", "slots", "lru", "best"),
    [
        ("", 2, 0, 0),
        ("aaaa", 1, 1, 1),
        ("abab", 1, 4, 4),
        ("abcabc", 2, 6, 4),
        ("abcabcabc", 2, 9, 6),
        ("abacada", 2, 4, 4),
        ("abcdabcd", 3, 8, 5),
        ("abcd", 4, 4, 4),
    ],
)
def test_small_traces_worked_out_by_hand(letters: str, slots: int, lru: int, best: int) -> None:
    trace = one_by_one(letters)
    assert replay(trace, GlobalLRU(), slots) == lru
    assert replay(trace, ReferenceLRU(), slots) == lru
    assert belady_misses(trace, slots) == best


def test_experts_of_one_entry_are_resident_together() -> None:
    trace = [[A, B], [B, C], [A, B]]
    assert replay(trace, GlobalLRU(), 2) == 4, "C may only replace A, since B is needed with it"
    assert belady_misses(trace, 2) == 4
    assert replay(trace, GlobalLRU(), 3) == 3


def test_a_hit_late_in_an_entry_is_not_evicted_by_a_miss_before_it() -> None:
    assert replay([[A], [B], [C, A]], GlobalLRU(), 2) == 3


def test_an_entry_that_does_not_fit_passes_through() -> None:
    """Experts that are resident at its start are hits, and its last experts stay resident."""
    assert replay([[A], [B, A, C]], GlobalLRU(), 2) == 3
    assert replay([[A, B, C], [B, C]], GlobalLRU(), 2) == 3
    assert replay([[A, B, C], [A]], GlobalLRU(), 2) == 4
    assert replay([[A, B, C], [A, B, C]], GlobalLRU(), 1) == 5, "C is a hit although the others replace it"
    assert belady_misses([[A, B, C], [A], [C]], 2) == 3
    assert belady_misses([[A, B, C], [A, B]], 1) == 4


def test_a_policy_is_told_what_a_cache_tells_it() -> None:
    calls: list[object] = []

    class Listener(GlobalLRU):
        def requested(self, layer: int, experts: Sequence[int]) -> None:
            calls.append((layer, list(experts)))

        def inserted(self, expert: ExpertId) -> None:
            calls.append(("inserted", expert))
            super().inserted(expert)

        def used(self, expert: ExpertId) -> None:
            calls.append(("used", expert))
            super().used(expert)

    replay([[A], [], [B, A]], Listener(), 2)
    assert calls == [(0, [0]), ("inserted", A), ("used", A)] + [
        (0, [1, 0]), ("used", A), ("inserted", B), ("used", B), ("used", A)
    ]  # fmt: skip


@pytest.mark.parametrize("seed", range(60))
def test_belady_equals_brute_force_on_tiny_traces(seed: int) -> None:
    draw = random.Random(seed)
    trace = random_trace(draw, layers=1, experts=4, top_k=2 + seed % 2, passes=7)
    slots = draw.randint(1, 3)
    assert belady_misses(trace, slots) == fewest_by_brute_force(trace, slots)


@pytest.mark.parametrize("seed", range(20))
def test_no_policy_beats_belady_and_the_reference_agrees(seed: int) -> None:
    draw = random.Random(seed)
    trace = random_trace(draw, layers=3, experts=6, top_k=3, passes=40)
    for slots in (2, 3, 5, 9, 18):
        best = belady_misses(trace, slots)
        policies: list[EvictionPolicy] = [GlobalLRU(), BalancedLRU(3, slots), HotTemporal([6] * 3), LRFU(4)]
        misses = [replay(trace, policy, slots) for policy in policies]
        assert best <= min(misses)
        assert misses[0] == replay(trace, ReferenceLRU(), slots)
    assert misses == [best] * 4, "with a slot for every expert, each policy misses it once"
