"""`spec-batch32`: large batches with drafts, against loading on demand without a cache, as SpecMoE does."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bench.measurement import BaseSize, Measurement
from bench.support.alternating import loaded, warm_up
from bench.support.checkpoints import FACTOR, SMALL_FACTOR, inflated
from bench.support.link_cells import ON_DEMAND
from bench.support.workload import Request, drafting_rates, mixed

NAME = "spec-batch32"
BAR = "tokens/s >= 2.5x at batch 32 and >= 4.3x at batch 128, or the floor analysis"
LINK_GBPS = 1.0
REQUESTS = {32: 96, 128: 256}
"""Of each batch size: places are filled again as replies end, until there are no more requests."""
BARS = {32: 2.5, 128: 4.3}
DRAFTS: dict[str, dict[str, Any]] = {
    "no drafts": {"speculate": "off"},
    "default": {},
    "n-grams": {"speculate": "ngram", "draft_shape": "chain", "draft_nodes": 8},
    "always": {"speculate": "ngram+self", "draft_shape": "chain", "draft_nodes": 8},
}


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """How wide the experts are, the requests of each size of a batch, and the longest reply."""

    factor: int = FACTOR
    requests: Mapping[int, int] = field(default_factory=lambda: REQUESTS)
    caches: tuple[str, ...] = ("10%", "25%")
    tokens: int = 40


FULL, SMALL = Size(), Size(small=True, factor=SMALL_FACTOR, requests={4: 6}, caches=("25%",), tokens=4)


def run(size: Size = FULL) -> Measurement:
    """All tasks mixed; prefills included, and the end, when fewer and fewer sequences are left."""
    curve = [at for batch in size.requests for at in _rows(batch, size)]
    best = {batch: max(at["ratio"] for at in curve if at["batch"] == batch) for batch in size.requests}
    value = {f"batch_{batch}": round(ratio, 2) for batch, ratio in best.items()}
    ok = all(ratio >= BARS.get(batch, 0) for batch, ratio in best.items())
    return Measurement(NAME, value, BAR, ok, {"curve": curve, "link_gbps": LINK_GBPS, "tokens": size.tokens})


def _rows(batch: int, size: Size) -> list[dict[str, Any]]:
    requests = mixed(size.requests[batch], size.tokens)
    rows = [point("on demand", batch, requests, size.factor, **ON_DEMAND)]
    _show(rows[0], rows[0])
    for cache in size.caches:
        for name, drafts in DRAFTS.items():
            rows.append(point(name, batch, requests, size.factor, expert_cache=cache, **drafts))
            _show(rows[-1], rows[0])
    return rows


def _show(at: dict[str, Any], demand: dict[str, Any]) -> None:
    at["ratio"] = at["tokens_per_second"] / demand["tokens_per_second"]
    at["volume"] = at["mb_per_token"] / demand["mb_per_token"]
    print(
        f"batch {at['batch']:3} {at['cache']:>4} {at['name']:10} {at['tokens_per_second']:6.1f} tokens/s "
        f"({at['ratio']:.2f}x), {at['mb_per_token']:5.1f} MB a token ({at['volume'] - 1:+.0%}), "
        f"{at['tokens_per_cycle']:.2f} tokens a cycle, link {at['link_share']:.0%} busy",
        flush=True,
    )


def point(
    name: str, batch: int, requests: list[Request], factor: int, *, expert_cache: Any, **settings: Any
) -> dict[str, Any]:
    """One engine over all of `requests`."""
    options = {"expert_cache": expert_cache, "link_gbps": LINK_GBPS, "batch": batch} | settings
    with loaded(inflated(factor), **options) as engine:
        warm_up(engine, requests[0][1])
        before, started = engine.stats, time.perf_counter()
        assert len(list(engine.generate_batch(requests))) == len(requests)
        seconds, after = time.perf_counter() - started, engine.stats
    row = {"name": name, "batch": batch, "cache": str(expert_cache)}
    return row | drafting_rates(before, after, seconds, LINK_GBPS)
