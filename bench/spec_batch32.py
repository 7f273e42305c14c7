"""`spec-batch32`: large batches with drafts in chains, against loading on demand without a cache, as SpecMoE does."""

from __future__ import annotations

import time
from typing import Any

from bench.alternating import loaded
from bench.checkpoints import inflated
from bench.measurement import Measurement
from bench.workload import Request, mixed

NAME = "spec-batch32"
BAR = "tokens/s >= 2.5x at batch 32 and >= 4.3x at batch 128, or the floor analysis"
LINK_GBPS = 1.0
TOKENS = 40
DRAFTS: dict[str, dict[str, Any]] = {
    "no drafts": {"speculate": "off"},
    "self": {"speculate": "self"},
    "both": {"speculate": "ngram+self"},
}
CHAINS = {"draft_shape": "chain", "draft_nodes": 4}


def run() -> Measurement:
    """As many requests as sequences run at a time, all tasks mixed; prefills included."""
    curve = [at for batch in (32, 128) for at in _batch(batch)]
    best = {batch: max(at["ratio"] for at in curve if at["batch"] == batch) for batch in (32, 128)}
    value = {f"batch_{batch}": round(ratio, 2) for batch, ratio in best.items()}
    ok = best[32] >= 2.5 and best[128] >= 4.3
    return Measurement(NAME, value, BAR, ok, {"curve": curve, "link_gbps": LINK_GBPS, "tokens": TOKENS})


def _batch(batch: int) -> list[dict[str, Any]]:
    requests = mixed(batch, TOKENS)
    # As many slots as a layer's pass needs to keep the link busy, and nothing is kept from one layer to the next.
    demand = point("on demand", batch, requests, expert_cache=8, speculate="off", prefetch="off")
    rows = [demand]
    for cache in ("10%", "25%"):
        for name, drafts in DRAFTS.items():
            rows.append(point(name, batch, requests, expert_cache=cache, **CHAINS, **drafts))
    for at in rows:
        at["ratio"] = at["tokens_per_second"] / demand["tokens_per_second"]
        at["volume"] = at["mb_per_token"] / demand["mb_per_token"]
        print(
            f"batch {batch:3} {at['cache']:>4} {at['name']:10} {at['tokens_per_second']:6.1f} tokens/s "
            f"({at['ratio']:.2f}x), {at['mb_per_token']:5.1f} MB a token ({at['volume'] - 1:+.0%}), "
            f"{at['tokens_per_step']:.2f} tokens a sequence and step, link {at['link_share']:.0%} busy",
            flush=True,
        )
    return rows


def point(name: str, batch: int, requests: list[Request], *, expert_cache: Any, **settings: Any) -> dict[str, Any]:
    """One engine over all of `requests`."""
    options = {"expert_cache": expert_cache, "link_gbps": LINK_GBPS, "batch": batch} | settings
    with loaded(inflated(), **options) as engine:
        engine.generate(*requests[0])
        before, started = engine.stats, time.perf_counter()
        assert len(list(engine.generate_batch(requests))) == len(requests)
        seconds, after = time.perf_counter() - started, engine.stats
    generated = after.tokens_generated - before.tokens_generated
    moved = after.bytes_loaded - before.bytes_loaded
    return {
        "name": name,
        "batch": batch,
        "cache": str(expert_cache),
        "tokens_per_second": generated / seconds,
        "mb_per_token": moved / 1e6 / generated,
        "tokens_per_step": (after.accepted + after.cycles) / max(1, after.cycles) if after.cycles else 1.0,
        "acceptance": after.accepted / max(1, after.drafted),
        "link_share": moved / 1e9 / seconds / LINK_GBPS,
        "draft_share": after.draft_seconds / seconds,
        "seconds": seconds,
    }
