"""The memory of moments against one that keeps plain lists and computes everything anew."""

from __future__ import annotations

import random

import numpy as np
import pytest

from edgemoe.cache.routing_history import FADE, NEAREST, REACH, SHARPNESS, RoutingHistory

Pass = tuple[int, list[int]]
F = np.float32


class PlainMoments:
    """What `RoutingHistory` should remember, from the passes of each moment as they were told."""

    def __init__(self, kept: int) -> None:
        self.kept = kept
        self.moments: list[dict[int, set[int]]] = []
        self.alike: dict[int, np.float32] = {}
        """By how many moments ago."""

    def begin(self, discount: float) -> None:
        self.discount = discount
        self.moments.append({})

    def follow(self, layer: int, wanted: list[int], experts: int) -> tuple[list[float], float]:
        now = self.moments[-1]
        now[layer] = set(wanted)
        oldest = min(len(self.moments), self.kept)
        for ago in range(1, oldest):
            then = self.moments[-1 - ago].get(layer, set())
            common, sizes = len(now[layer] & then), [F(1) / np.sqrt(F(max(1, len(one)))) for one in (then, now[layer])]
            cosine = F(common) * sizes[0] * (sizes[1] * F(1 - FADE))
            self.alike[ago] = F(FADE) * self.alike.get(ago, F(0)) + cosine
        nearest = sorted(range(1, oldest), key=lambda ago: -self.alike[ago])[:NEAREST]
        soon, total = [0.0] * experts, 0.0
        for ago in nearest:
            weight = float(self.alike[ago]) ** SHARPNESS
            total += weight
            for expert in range(experts):
                until = self.until(ago, layer, expert)
                soon[expert] += weight * self.discount ** (until - 1) if until else 0
        return soon, total

    def until(self, ago: int, layer: int, expert: int) -> int:
        """Moments from `ago` moments ago until the next use of the expert; 0 without one."""
        for later in range(1, min(ago, REACH) + 1):
            if expert in self.moments[-1 - ago + later].get(layer, set()):
                return later
        return 0


def random_passes(draw: random.Random, experts: list[int], moments: int) -> list[list[Pass]]:
    """Moments of passes through the layers, a few of which leave layers out; what is wanted repeats itself."""
    phrases = [
        [(layer, draw.sample(range(count), draw.randint(0, count))) for layer, count in enumerate(experts)]
        for _ in range(6)
    ]
    found = []
    for _ in range(moments):
        phrase = draw.choice(phrases)
        length = draw.choice([len(phrase), len(phrase), draw.randint(1, len(phrase))])
        found.append([one for one in phrase[:length] if draw.random() < 0.95] or phrase[:1])
    return found


@pytest.mark.parametrize(("seed", "kept", "moments"), [(0, 12, 60), (1, 16, 60), (2, 15, 90), (3, 5, 40), (4, 1, 12)])
def test_the_memory_equals_the_plain_one(seed: int, kept: int, moments: int) -> None:
    """With no more moments than are recalled, so that equals among the nearest make no difference."""
    assert kept <= NEAREST
    draw = random.Random(seed)
    experts = [7, 5, 9]
    fast, plain = RoutingHistory(experts, kept), PlainMoments(kept)
    soon = np.full(max(experts), np.nan, np.float32)
    for passes in random_passes(draw, experts, moments):
        discount = draw.choice([0.25, 0.75])
        fast.begin(discount)
        plain.begin(discount)
        for layer, wanted in passes:
            total = fast.follow(layer, np.array(wanted, np.int64), soon)
            expected, weight = plain.follow(layer, wanted, experts[layer])
            assert total == pytest.approx(weight, rel=1e-4)
            assert soon[: experts[layer]].tolist() == pytest.approx(expected, rel=1e-4)
            assert not soon[experts[layer] :].any()


def test_uses_beyond_reach_count_as_none() -> None:
    fast = RoutingHistory([3])
    soon = np.zeros(3, np.float32)
    for wanted in [[0], *[[1]] * (REACH - 1), [2], [1], [2]]:
        fast.begin(1.0)
        fast.follow(0, np.array(wanted), soon)
    assert fast._until[0, 2, 0] == REACH
    fast = RoutingHistory([3])
    for wanted in [[0], *[[1]] * REACH, [2]]:
        fast.begin(1.0)
        fast.follow(0, np.array(wanted), soon)
    assert fast._until[0, 2, :2].tolist() == [0, REACH]


@pytest.mark.parametrize("kept", [50, 1024])
def test_only_the_nearest_of_many_are_recalled(kept: int) -> None:
    """Large choices of many sizes, so that no two moments are equally like now."""
    draw = random.Random(kept)
    fast, plain = RoutingHistory([40] * 3, kept), PlainMoments(kept)
    soon = np.zeros(40, np.float32)
    for _ in range(150):
        fast.begin(0.5)
        plain.begin(0.5)
        for layer in range(3):
            wanted = draw.sample(range(40), draw.randint(3, 25))
            total = fast.follow(layer, np.array(wanted), soon)
            expected, weight = plain.follow(layer, wanted, 40)
            if len(set(plain.alike.values())) == len(plain.alike):
                assert total == pytest.approx(weight, rel=1e-4)
                assert soon.tolist() == pytest.approx(expected, rel=1e-4)
    assert len(set(plain.alike.values())) == len(plain.alike) > 2 * NEAREST


def test_what_followed_a_phrase_is_recalled_when_the_phrase_returns() -> None:
    experts = [16, 16, 16]
    fast = RoutingHistory(experts)
    soon = np.zeros(16, np.float32)
    draw = random.Random(5)

    def moment(choose: list[list[int]]) -> float:
        fast.begin(0.5)
        return [fast.follow(layer, np.array(wanted), soon) for layer, wanted in enumerate(choose)][-1]

    phrase = [[draw.sample(range(16), 2) for _ in experts] for _ in range(4)]
    others = [[draw.sample(range(16), 2) for _ in experts] for _ in range(60)]
    for choose in phrase + others:
        moment(choose)
    moment(phrase[0])
    known = moment(phrase[1])
    assert set(np.argsort(-soon)[:2].tolist()) == set(phrase[2][2])
    assert soon[phrase[2][2]] / known == pytest.approx([1, 1], abs=0.1)
