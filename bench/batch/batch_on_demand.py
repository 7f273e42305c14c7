"""`batch-on-demand`: 64 sequences sharing experts against loading every needed expert for every sequence."""

from __future__ import annotations

from dataclasses import dataclass

from bench.batch.batch_sharing import LINK_GBPS, point
from bench.measurement import BaseSize, Measurement
from bench.support.checkpoints import FACTOR, SMALL_FACTOR, inflated
from bench.support.workload import mixed
from edgemoe import Engine

NAME = "batch-on-demand"
BAR = "tokens/s >= 4x"


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """How wide the experts are, how many sequences share them, and what is asked."""

    factor: int = FACTOR
    batch: int = 64
    alone: int = 16
    """Requests that the slow side answers: enough for its speed, which does not depend on their number."""
    tokens: int = 64


FULL, SMALL = Size(), Size(small=True, factor=SMALL_FACTOR, batch=3, alone=1, tokens=4)


def run(size: Size = FULL) -> Measurement:
    """On demand, a sequence runs alone and finds nothing: as many slots as one layer's pass needs, in all."""
    top_k = Engine.plan_for(inflated(size.factor), device="cpu").top_k
    requests = mixed(2 * size.batch, size.tokens)
    shared = point(size.batch, requests, size.factor)
    alone = point(1, requests[: size.alone], size.factor, expert_cache=top_k)
    for name, at in ((f"batch {size.batch}", shared), ("on demand", alone)):
        print(f"{name:10} {at['tokens_per_second']:6.1f} tokens/s, {at['mb_per_token']:6.1f} MB a token", flush=True)
    ratio = shared["tokens_per_second"] / alone["tokens_per_second"]
    volume = shared["mb_per_token"] / alone["mb_per_token"]
    value = {"ratio": round(ratio, 2), "transfer_volume": round(volume, 3)}
    detail = {"shared": shared, "on_demand": alone, "link_gbps": LINK_GBPS}
    return Measurement(NAME, value, BAR, ratio >= 4, detail)
