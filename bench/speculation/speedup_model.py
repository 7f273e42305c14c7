"""`speedup-model`: what the performance model says of speculation, against cycles that were no part of its fit."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

from bench.measurement import BaseSize, Measurement
from bench.support.checkpoints import inflated, tiny
from edgemoe.checkpoint.blueprint import Blueprint, open_blueprint
from edgemoe.config import EngineConfig
from edgemoe.measure.profiler import LEAN_SHAPES, SHAPES, ProfilingRun, point, profiling_run, take_profile
from edgemoe.measure.text_passes import PassReading
from edgemoe.plan.performance_model import PerformanceModel
from edgemoe.plan.profile import ProfilePoint
from edgemoe.plan.profile_plot import draw

NAME = "speedup-model"
BAR = "mean absolute error of the predicted speed-up <= 12 % at >= 30 points that were not used in the fit"
LINK_GBPS = 4.0
DEPTHS = dict.fromkeys((1, 3, 6, 12, 24, 48, 64), (2, 5, 8)) | dict.fromkeys((1, 64), (2, 5, 7))
"""Of drafts, at every batch. At its ends the fit had 8."""
ALPHA = 0.7
"""Probability with which a drafted token is right here; the share that was is what the model is told."""
SEED = 1000
"""Of texts that the fit has not read."""


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """The model, and where cycles are measured how often."""

    model: Callable[[], Path] = inflated
    caches: tuple[str, ...] = ("100%", "50%", "25%")
    depths: Mapping[int, tuple[int, ...]] = field(default_factory=lambda: DEPTHS)
    rounds: int = 3


FULL, SMALL = Size(), Size(small=True, model=tiny, caches=("50%",), depths={3: (2,)}, rounds=1)


def run(size: Size = FULL) -> Measurement:
    """A profile first, then cycles and plain steps in turns at every point of every cache. Warm."""
    blueprint = open_blueprint(size.model())
    config = EngineConfig(device="cpu", link_gbps=LINK_GBPS, file_reads="cached")
    profile = take_profile(blueprint, config)
    picture = size.picture("profile")
    draw(profile, picture)
    size.keep("profile", profile.to_dict())
    found = [at for cache in size.caches for at in measure(blueprint, config, cache, profile.model, size)]
    for at in found:
        print(
            f"{at['cache']:>4} batch {at['batch']:2} drafted {at['depth']}: {at['measured']:.2f} x, predicted "
            f"{at['predicted']:.2f} x ({at['error']:.0%} off), without the hit rate {at['by_share']:.2f} x",
            flush=True,
        )
    error = fmean(at["error"] for at in found)
    value = {
        "points": len(found),
        "error": round(error, 3),
        "median_error": round(median(at["error"] for at in found), 3),
        "error_by_cache": {
            cache: round(fmean(at["error"] for at in found if at["cache"] == cache), 3) for cache in size.caches
        },
        "error_without_hit_rate": round(fmean(abs(at["by_share"] / at["measured"] - 1) for at in found), 3),
    }
    detail = {"points": found, "profile": profile.to_dict(), "alpha": ALPHA, "picture": picture.name}
    return Measurement(NAME, value, BAR, error <= 0.12 and len(found) >= 30, detail)


def measure(
    blueprint: Blueprint, config: EngineConfig, cache: str, model: PerformanceModel, size: Size
) -> list[dict[str, Any]]:
    """Every batch and depth with one size of the cache."""
    with profiling_run(blueprint, replace(config, expert_cache=cache), lambda progress: None, SEED) as at:
        return [each for batch in size.depths for each in _cycles(at, cache, batch, model, size)]


def _cycles(at: ProfilingRun, cache: str, batch: int, model: PerformanceModel, size: Size) -> list[dict[str, Any]]:
    """Plain steps and cycles of every depth in turns, all with the same texts."""
    draw_right, depths = random.Random(batch), size.depths[batch]
    readings: dict[int, list[PassReading]] = {depth: [] for depth in (0, *depths)}
    tokens: dict[int, list[float]] = {depth: [] for depth in depths}
    for turn in range(size.rounds):
        first = turn * at.sequences // size.rounds + batch
        for depth in readings:
            warm, passes = max(1, 8 // batch), max(2, min(6, 16 // batch))
            for number in range(warm + passes):
                right = [_right(draw_right, depth) for _ in range(batch)] if depth else None
                reading = at.passes.run(first, batch, depth + 1, right)
                if number >= warm:
                    readings[depth].append(reading)
                    if right is not None:
                        tokens[depth].append(fmean(right) + 1)
    plain = point(at.plan, batch, 1, readings[0])
    return [
        _compared(cache, plain, point(at.plan, batch, depth + 1, readings[depth]), fmean(tokens[depth]), model)
        for depth in depths
    ]


def _right(chance: random.Random, depth: int) -> int:
    """How many of `depth` drafted tokens are right before the first that is not."""
    return next((number for number in range(depth) if chance.random() >= ALPHA), depth)


def _compared(
    cache: str, plain: ProfilePoint, verify: ProfilePoint, tokens: float, model: PerformanceModel
) -> dict[str, Any]:
    batch, depth = plain.batch, verify.tokens - 1
    assert (batch, verify.tokens) not in {*SHAPES, *LEAN_SHAPES}, "this point was used in the fit"
    cycle = verify.draft_seconds + verify.seconds + verify.reject_seconds
    measured = tokens * (plain.seconds + plain.reject_seconds) / cycle
    asked = [1 - each.misses / (model.shape.layers * each.experts) for each in (plain, verify)]
    likely = [model.hit_rate(plain.cache_share, batch, count) for count in (1, verify.tokens)]
    predicted, by_share = (model.speedup(batch, depth, tokens, *rates) for rates in (asked, likely))
    return {
        "cache": cache,
        "batch": batch,
        "depth": depth,
        "measured": measured,
        "predicted": predicted,
        "error": abs(predicted / measured - 1),
        "by_share": by_share,
        "plain_ms": 1e3 * plain.seconds,
        "predicted_plain_ms": 1e3 * model.step_seconds(batch, 1, asked[0]),
        "verify_ms": 1e3 * verify.seconds,
        "predicted_verify_ms": 1e3 * model.step_seconds(batch, depth + 1, asked[1]),
        "tokens_per_cycle": tokens,
        "hit_rates": asked,
    }
