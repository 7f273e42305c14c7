"""`cache-policy`: hit rates of eviction policies on recorded routing against Belady's optimum."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from bench.measurement import BaseSize, Measurement
from bench.support.engine_parts import cache_of
from bench.support.policies.lru import BalancedLRU, GlobalLRU
from bench.support.policies.rivals import LRFU, BalancedLRFU
from bench.support.policies.trace import belady_misses, replay
from edgemoe import Engine, Sampling
from edgemoe.cache.eviction.hot_temporal import HotTemporal
from edgemoe.cache.eviction.policy import EvictionPolicy
from edgemoe.cache.record import ExpertId
from edgemoe.demo.tasks import HELD_OUT_SEED, TASKS

NAME = "cache-policy"
BAR = "the default's hit rate >= 0.88 of Belady's with slots for 25, 50 and 75 % of the experts, and never below LRU's"
SIZES = (0.125, 0.25, 0.5, 0.75)
JUDGED = SIZES[1:]
DEFAULT, LRUS = "HotTemporal", ("LRU, all layers together", "LRU, equal shares")
SPECULATION = {"plain": "off", "verified": "ngram"}
"""What makes the passes: tokens one by one, or drafts that are verified several at a time."""

Entries = list[list[ExpertId]]


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """Held-out questions of each documented task, one at a time, and the longest reply."""

    items: int = 8
    tokens: int = 160


FULL, SMALL = Size(), Size(small=True, items=1, tokens=8)


def policies(experts: Sequence[int], slots: int) -> dict[str, Callable[[], EvictionPolicy]]:
    """The factories of the compared policies, by name."""
    layers = len(experts)
    return {
        LRUS[0]: GlobalLRU,
        LRUS[1]: lambda: BalancedLRU(layers, slots),
        "LFU, equal shares": lambda: BalancedLRFU(layers, slots, math.inf),
        "LRFU, half-life 8, all layers together": lambda: LRFU(8),
        "LRFU, half-life 8, equal shares": lambda: BalancedLRFU(layers, slots, 8),
        "LRFU, half-life 64, equal shares": lambda: BalancedLRFU(layers, slots, 64),
        DEFAULT: lambda: HotTemporal(experts),
    }


def run(size: Size = FULL) -> Measurement:
    """Records once for each way of making passes, replays in the tasks' order and shuffled, with empty slots first."""
    found: dict[str, dict[str, Any]] = {}
    for passes, speculate in SPECULATION.items():
        replies, experts = recorded(speculate, size)
        shuffled = random.Random(0).sample(replies, len(replies))
        for order, those in (("by task", replies), ("shuffled", shuffled)):
            name = f"{passes}, {order}"
            found[name] = compare([entry for reply in those for entry in reply], experts)
            show(name, found[name])
    judged = [at[str(share)] for at in found.values() for share in JUDGED]
    least = min(at["of_belady"][DEFAULT] for at in judged)
    every = [at["hit_rates"] for sizes in found.values() for at in sizes.values()]
    below = sum(rates[DEFAULT] < max(rates[lru] for lru in LRUS) for rates in every)
    value = {"least_share_of_belady": round(least, 3), "below_lru": below}
    detail = {"questions": size.items * len(TASKS), "tokens": size.tokens, "traces": found}
    return Measurement(NAME, value, BAR, least >= 0.88 and not below, detail)


def recorded(speculate: str, size: Size) -> tuple[list[Entries], tuple[int, ...]]:
    """The trace of each reply, prompt included, and the number of experts of each layer of the shipped model."""
    replies: list[Entries] = []
    settings = Sampling(temperature=0, max_tokens=size.tokens)
    # Requests depend neither on the cache nor on the link.
    options: dict[str, Any] = {"expert_cache": "100%", "context": 512, "prefetch": "off", "state_folder": "none"}
    with Engine.load(device="cpu", speculate=speculate, **options) as engine:
        cache = cache_of(engine)
        for task in TASKS:
            for item in islice(task.items(HELD_OUT_SEED, held_out=True), size.items):
                cache.recording = []
                engine.generate(engine.chat_prompt([{"role": "user", "content": item.user}]), settings)
                replies.append(cache.recording)
        return replies, tuple(cache.store.experts)


def compare(trace: Entries, experts: Sequence[int]) -> dict[str, Any]:
    """For each share of experts with slots: Belady's hit rate, and each policy's, absolute and relative to Belady's."""
    asked = sum(map(len, trace))
    found = {}
    for size in SIZES:
        slots = round(size * sum(experts))
        best = 1 - belady_misses(trace, slots) / asked
        rates = {name: 1 - replay(trace, make(), slots) / asked for name, make in policies(experts, slots).items()}
        shares = {name: rate / best for name, rate in rates.items()}
        found[str(size)] = {"slots": slots, "belady": best, "hit_rates": rates, "of_belady": shares}
    return found


def show(name: str, sizes: dict[str, Any]) -> None:
    """One trace as a table: a row a policy, a hit rate and a share of Belady's for each size."""
    heads = "".join(f"{float(size):>15.1%}" for size in sizes)
    print(f"\n{name:40}{heads}")
    print(f"{'Belady':40}" + "".join(f"{at['belady']:>15.3f}" for at in sizes.values()))
    for policy in next(iter(sizes.values()))["hit_rates"]:
        cells = (f"{at['hit_rates'][policy]:.3f} ({at['of_belady'][policy]:.3f})" for at in sizes.values())
        print(f"{policy:40}" + "".join(f"{cell:>15}" for cell in cells), flush=True)
