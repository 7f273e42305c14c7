"""`batch-on-demand`: 64 sequences sharing experts against loading every needed expert for every sequence."""

from __future__ import annotations

from bench.batch.batch_sharing import LINK_GBPS, TOKENS, point
from bench.measurement import Measurement
from bench.support.checkpoints import inflated
from bench.support.workload import mixed
from edgemoe import Engine

NAME = "batch-on-demand"
BAR = "tokens/s >= 4x"
BATCH = 64
ALONE = 16
"""Requests that the slow side answers: enough for its speed, which does not depend on their number."""


def run() -> Measurement:
    """On demand, a sequence runs alone and finds nothing: as many slots as one layer's pass needs, in all."""
    top_k = Engine.plan_for(inflated(), device="cpu").top_k
    requests = mixed(2 * BATCH, TOKENS)
    shared = point(BATCH, requests)
    alone = point(1, requests[:ALONE], expert_cache=top_k)
    for name, at in (("batch 64", shared), ("on demand", alone)):
        print(f"{name:10} {at['tokens_per_second']:6.1f} tokens/s, {at['mb_per_token']:6.1f} MB a token", flush=True)
    ratio = shared["tokens_per_second"] / alone["tokens_per_second"]
    volume = shared["mb_per_token"] / alone["mb_per_token"]
    value = {"ratio": round(ratio, 2), "transfer_volume": round(volume, 3)}
    detail = {"batch_64": shared, "on_demand": alone, "link_gbps": LINK_GBPS}
    return Measurement(NAME, value, BAR, ratio >= 4, detail)
