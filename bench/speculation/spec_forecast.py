"""`spec-forecast`: what a self-draft's routing says of the verification, and what came of the bytes moved for it."""

from __future__ import annotations

from dataclasses import dataclass

from bench.measurement import BaseSize, Measurement
from bench.support.alternating import answer, loaded, questions, warm_up
from bench.support.checkpoints import FACTOR, SMALL_FACTOR, inflated
from edgemoe import Sampling

NAME = "spec-forecast"
BAR = "names >= 75 % of the verification's missing experts; >= 70 % of the prefetched bytes used"
RULES = ("reselect", "fewer")
LINK_GBPS = 1.0


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """How wide the experts are, and what is asked."""

    factor: int = FACTOR
    tasks: tuple[str, ...] = ()
    """Of the shipped model; all of them where none is named."""
    tokens: int = 64


FULL, SMALL = Size(), Size(small=True, factor=SMALL_FACTOR, tasks=("repeat", "count"), tokens=8)


def run(size: Size = FULL) -> Measurement:
    """The widened demo, half of its experts cached, one question of every task; trees of 8 nodes. Warm."""
    found = {rule: measure(rule, size) for rule in RULES}
    for rule, at in found.items():
        print(f"{rule:10} " + ", ".join(f"{key} {value:.3g}" for key, value in at.items()), flush=True)
    ours = found[RULES[0]]
    value = {"recall": round(ours["recall"], 3), "used": round(ours["used"], 3)}
    detail = {"rules": found, "link_gbps": LINK_GBPS, "cache": "50%"}
    return Measurement(NAME, value, BAR, ours["recall"] >= 0.75 and ours["used"] >= 0.7, detail)


def measure(rule: str, size: Size) -> dict[str, float]:
    """One rule of self-drafts. Late prefetches are used ones: they were asked for on their way."""
    sampling = Sampling(temperature=0, max_tokens=size.tokens)
    drafts = {"speculate": "self", "draft_rule": rule, "draft_nodes": 8}
    with loaded(inflated(size.factor), expert_cache="50%", link_gbps=LINK_GBPS, **drafts) as engine:
        warm_up(engine, sampling)
        before = engine.stats
        for question in questions(1, size.tasks):
            answer(engine, question, sampling)
        stats = engine.stats
    used, late, wasted = (
        getattr(stats, f"bytes_prefetched_{fate}") - getattr(before, f"bytes_prefetched_{fate}")
        for fate in ("used", "late", "wasted")
    )
    own = stats.forecast_bytes_useful + stats.forecast_bytes_late
    return {
        "recall": stats.forecast_recall,
        "precision": stats.forecast_precision,
        "used": (used + late) / max(1, used + late + wasted),
        "late": late / max(1, used + late),
        "mb_prefetched": (used + late + wasted) / 1e6,
        # By the very pass that it was foretold for, of what this predictor alone had brought.
        "used_at_once": own / max(1, own + stats.forecast_bytes_wasted),
        "acceptance": stats.accepted / max(1, stats.drafted),
        "tokens_per_cycle": stats.tokens_per_cycle,
    }
