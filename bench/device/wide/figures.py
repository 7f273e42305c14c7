"""What is measured of one loaded engine: steps, prompts, drafts, what the link did, and the floor under a step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from bench.device.timing import synchronize
from bench.device.wide.checkpoints import WHOLE_LAYERS
from bench.support.engine_parts import cache_of, link_of, runner_of
from edgemoe import Engine, Sampling
from edgemoe.experts.draft_routing import DraftRouting
from edgemoe.model.sequential_runner import PassInput
from edgemoe.plan.plan import Plan
from edgemoe.plan.profile import CardSpeed

DRAWN = Sampling(temperature=1.0, top_k=20, top_p=1.0, seed=1, ignore_eos=True)
"""Greedy tokens of random weights go in circles, and so always need the same experts."""
DRAFTS = (1, 4)
"""Tokens of a draft pass: the first one, and a level of a tree."""
PASSES = 12


def prompt(tokens: int, seed: int = 1) -> list[int]:
    """Token ids drawn at random, always the same for a seed."""
    ids = torch.randint(3, 1000, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()
    return [int(each) for each in ids]


def decoding(engine: Engine, tokens: int) -> dict[str, Any]:
    """Steps of one sequence, and what the link did meanwhile."""
    link, ids = link_of(engine), prompt(24)
    _step_seconds(engine, ids[:16], 12)
    before, busy, moved, began = engine.stats, link.busy_seconds, link.bytes_moved, time.perf_counter()
    step = _step_seconds(engine, ids, tokens)
    after, wall = engine.stats, time.perf_counter() - began
    busy, moved = link.busy_seconds - busy, link.bytes_moved - moved
    hits, misses = after.hits - before.hits, after.misses - before.misses
    return {
        "ms_a_step": round(1e3 * step, 3),
        "hit_rate": round(hits / max(1, hits + misses), 3),
        "tier": engine.plan.host_tier,
        "link_GBps": round(moved / max(1e-9, busy) / 1e9, 1),
        "link_busy": round(busy / wall, 2),
        "MB_a_step": round(moved / tokens / 1e6, 1),
        "waited": round((after.link_wait_seconds - before.link_wait_seconds) / wall, 3),
    }


def _step_seconds(engine: Engine, ids: Sequence[int], tokens: int) -> float:
    """The median time between tokens, without the first third of them."""
    marks = []
    for _ in engine.stream(list(ids), replace(DRAWN, max_tokens=tokens)):
        marks.append(time.perf_counter())
    steps = [later - sooner for sooner, later in zip(marks, marks[1:], strict=False)]
    return statistics.median(steps[len(marks) // 3 :])


def prefill_seconds(engine: Engine, tokens: int) -> float:
    """Seconds to the first token after a prompt of `tokens` tokens, of which nothing is known yet."""
    taken = []
    # The first one compiles, and makes room.
    for seed in (2 * tokens, 2 * tokens + 1):
        began = time.perf_counter()
        next(engine.stream(prompt(tokens, seed), Sampling(max_tokens=1, ignore_eos=True)))
        taken.append(time.perf_counter() - began)
    return round(taken[-1], 4)


def draft_ms(engine: Engine) -> dict[str, float]:
    """The median milliseconds of a self-draft's pass among residents, with what it reads back, by its tokens."""
    runner, experts = runner_of(engine), cache_of(engine)
    sequence = runner.start(engine.plan.context)
    runner.step(sequence, prompt(24))
    base, found = sequence.tokens, {}
    for tokens in DRAFTS:
        taken = []
        for number in range(PASSES):
            routing = DraftRouting(experts, experts.store.experts, "reselect")
            sequence.mark()
            synchronize()
            began = time.perf_counter()
            with runner.sequential.layers.overriding(routing):
                runner.run_sampled([PassInput(sequence, prompt(tokens, number), every=True)])
            routing.wanted_on_host()
            taken.append(time.perf_counter() - began)
            sequence.rollback(base)
        # The first pass captures.
        found[f"{tokens} tokens"] = round(1e3 * statistics.median(taken[2:]), 3)
    return found


@dataclass(frozen=True)
class Fixed:
    """What a step takes beside its layers, and what a layer reads beside its experts."""

    seconds: float
    """Of a step: embedding, head, sampling, scheduling."""
    layer_nbytes: float
    """Of a layer's weights without its experts."""

    @classmethod
    def between(cls, short: Plan, short_seconds: float, whole: Plan, seconds: float) -> Fixed:
        """From steps with a slot for every expert, of models of few layers and of more."""
        more = whole.layers - short.layers
        layer = max(0.0, (seconds - short_seconds) / more)
        nbytes = (whole.dense_nbytes - short.dense_nbytes) / more
        return cls(max(0.0, short_seconds - short.layers * layer), nbytes)


def against_floor(row: dict[str, Any], plan: Plan, card: CardSpeed, fixed: Fixed) -> dict[str, Any]:
    """A layer's milliseconds, those of a step of the whole model, and the floor: the slowest of what has to be moved.

    Misses go over the link, or with the CPU's help partly not; hits, misses and the dense weights are read once from
    the card's memory.
    """
    layer = max(0.0, row["ms_a_step"] / 1e3 - fixed.seconds) / plan.layers
    chosen = plan.top_k * plan.record_nbytes
    missed = (1 - row["hit_rate"]) * chosen
    floors = {
        "link": missed / card.pcie,
        "link and CPU": missed / max(card.pcie_beside + card.cpu_beside, 1.0),
        "vram": (chosen + fixed.layer_nbytes) / card.vram,
    }
    floor = max(floors["link"], floors["vram"])
    step = fixed.seconds + WHOLE_LAYERS * layer
    return {
        "ms_a_layer": round(1e3 * layer, 4),
        f"ms_of_{WHOLE_LAYERS}_layers": round(1e3 * step, 2),
        f"tokens_s_of_{WHOLE_LAYERS}_layers": round(1 / max(step, 1e-9), 1),
        "floor_ms_a_layer": {name: round(1e3 * seconds, 4) for name, seconds in floors.items()},
        "of_floor": round(layer / max(floor, 1e-12), 2),
        "link_of_pinned": round(row["link_GBps"] * 1e9 / card.pcie, 3),
    }
