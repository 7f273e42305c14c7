"""The memory of passes against a plain one, which keeps lists and computes everything anew."""

from __future__ import annotations

import random

import numpy as np
import pytest

from edgemoe.cache.eviction.routing_history import HORIZON, LAYER_DECAY, NEIGHBOURS, SHARPNESS, RoutingHistory

LayerPass = tuple[int, list[int]]
F = np.float32


class PlainHistory:
    """A plain `RoutingHistory`, from the list of all passes."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.passes: list[dict[int, set[int]]] = []
        self.similarity: dict[int, np.float32] = {}
        """By distance in passes."""

    def begin_pass(self, discount: float) -> None:
        self.discount = discount
        self.passes.append({})

    def observe(self, layer: int, requested: list[int], experts: int) -> tuple[list[float], float]:
        now = self.passes[-1]
        now[layer] = set(requested)
        oldest = min(len(self.passes), self.capacity)
        for ago in range(1, oldest):
            then = self.passes[-1 - ago].get(layer, set())
            common, sizes = len(now[layer] & then), [F(1) / np.sqrt(F(max(1, len(one)))) for one in (then, now[layer])]
            cosine = F(common) * sizes[0] * (sizes[1] * F(1 - LAYER_DECAY))
            self.similarity[ago] = F(LAYER_DECAY) * self.similarity.get(ago, F(0)) + cosine
        nearest = sorted(range(1, oldest), key=lambda ago: -self.similarity[ago])[:NEIGHBOURS]
        recalled, total = [0.0] * experts, 0.0
        for ago in nearest:
            weight = float(self.similarity[ago]) ** SHARPNESS
            total += weight
            for expert in range(experts):
                next_use = self.next_use(ago, layer, expert)
                recalled[expert] += weight * self.discount ** (next_use - 1) if next_use else 0
        return recalled, total

    def next_use(self, ago: int, layer: int, expert: int) -> int:
        """The distance in passes from the pass `ago` passes ago to the next use of the expert; 0 without one."""
        for later in range(1, min(ago, HORIZON) + 1):
            if expert in self.passes[-1 - ago + later].get(layer, set()):
                return later
        return 0


def random_passes(draw: random.Random, experts: list[int], passes: int) -> list[list[LayerPass]]:
    """Passes with repeating requests, some of which skip layers."""
    phrases = [
        [(layer, draw.sample(range(count), draw.randint(0, count))) for layer, count in enumerate(experts)]
        for _ in range(6)
    ]
    found = []
    for _ in range(passes):
        phrase = draw.choice(phrases)
        length = draw.choice([len(phrase), len(phrase), draw.randint(1, len(phrase))])
        found.append([one for one in phrase[:length] if draw.random() < 0.95] or phrase[:1])
    return found


@pytest.mark.parametrize(
    ("seed", "capacity", "passes"), [(0, 12, 60), (1, 16, 60), (2, 15, 90), (3, 5, 40), (4, 1, 12)]
)
def test_the_memory_equals_the_plain_one(seed: int, capacity: int, passes: int) -> None:
    """All stored passes are recalled, so that ties make no difference."""
    assert capacity <= NEIGHBOURS
    draw = random.Random(seed)
    experts = [7, 5, 9]
    fast, plain = RoutingHistory(experts, capacity), PlainHistory(capacity)
    recalled = np.full(max(experts), np.nan, np.float32)
    for layers in random_passes(draw, experts, passes):
        discount = draw.choice([0.25, 0.75])
        fast.begin_pass(discount)
        plain.begin_pass(discount)
        for layer, requested in layers:
            total = fast.observe(layer, np.array(requested, np.int64), recalled)
            expected, weight = plain.observe(layer, requested, experts[layer])
            assert total == pytest.approx(weight, rel=1e-4)
            assert recalled[: experts[layer]].tolist() == pytest.approx(expected, rel=1e-4)
            assert not recalled[experts[layer] :].any()


def test_uses_beyond_reach_count_as_none() -> None:
    fast = RoutingHistory([3])
    recalled = np.zeros(3, np.float32)
    for requested in [[0], *[[1]] * (HORIZON - 1), [2], [1], [2]]:
        fast.begin_pass(1.0)
        fast.observe(0, np.array(requested), recalled)
    assert fast._next_use[0, 2, 0] == HORIZON
    fast = RoutingHistory([3])
    for requested in [[0], *[[1]] * HORIZON, [2]]:
        fast.begin_pass(1.0)
        fast.observe(0, np.array(requested), recalled)
    assert fast._next_use[0, 2, :2].tolist() == [0, HORIZON]


@pytest.mark.parametrize("capacity", [50, 1024])
def test_only_the_nearest_of_many_are_recalled(capacity: int) -> None:
    """Large requests of many sizes, so that similarities have no ties."""
    draw = random.Random(capacity)
    fast, plain = RoutingHistory([40] * 3, capacity), PlainHistory(capacity)
    recalled = np.zeros(40, np.float32)
    for _ in range(150):
        fast.begin_pass(0.5)
        plain.begin_pass(0.5)
        for layer in range(3):
            requested = draw.sample(range(40), draw.randint(3, 25))
            total = fast.observe(layer, np.array(requested), recalled)
            expected, weight = plain.observe(layer, requested, 40)
            if len(set(plain.similarity.values())) == len(plain.similarity):
                assert total == pytest.approx(weight, rel=1e-4)
                assert recalled.tolist() == pytest.approx(expected, rel=1e-4)
    assert len(set(plain.similarity.values())) == len(plain.similarity) > 2 * NEIGHBOURS


def test_what_followed_a_phrase_is_recalled_when_the_phrase_returns() -> None:
    experts = [16, 16, 16]
    fast = RoutingHistory(experts)
    recalled = np.zeros(16, np.float32)
    draw = random.Random(5)

    def forward(layers: list[list[int]]) -> float:
        fast.begin_pass(0.5)
        return [fast.observe(layer, np.array(requested), recalled) for layer, requested in enumerate(layers)][-1]

    phrase = [[draw.sample(range(16), 2) for _ in experts] for _ in range(4)]
    others = [[draw.sample(range(16), 2) for _ in experts] for _ in range(60)]
    for layers in phrase + others:
        forward(layers)
    forward(phrase[0])
    known = forward(phrase[1])
    assert set(np.argsort(-recalled)[:2].tolist()) == set(phrase[2][2])
    assert recalled[phrase[2][2]] / known == pytest.approx([1, 1], abs=0.1)
