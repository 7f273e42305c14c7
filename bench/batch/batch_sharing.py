"""`batch-sharing`: throughput and traffic over batch sizes, a quarter of the experts cached, a throttled link."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.measurement import BaseSize, Measurement
from bench.support.alternating import warm_up
from bench.support.checkpoints import FACTOR, SMALL_FACTOR, inflated
from bench.support.workload import Request, mixed
from edgemoe import Engine

NAME = "batch-sharing"
BAR = "tokens/s at batch 16 >= 4x batch 1"
LINK_GBPS = 4.0
CACHE = "25%"
REQUESTS = {1: 27, 4: 36, 16: 144, 64: 144, 256: 288}
"""Requests that each size answers; a large batch needs more of them to be full for most of the time."""


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """How wide the experts are, what each size of a batch answers, and the longest reply."""

    factor: int = FACTOR
    requests: Mapping[int, int] = field(default_factory=lambda: REQUESTS)
    tokens: int = 64


FULL, SMALL = Size(), Size(small=True, factor=SMALL_FACTOR, requests={1: 2, 16: 6}, tokens=4)


def run(size: Size = FULL) -> Measurement:
    """Each size answers the first requests of one mix. Warm: one request came before."""
    questions = mixed(max(size.requests.values()), size.tokens)
    curve = [point(batch, questions[:count], size.factor) for batch, count in size.requests.items()]
    base = curve[0]["tokens_per_second"]
    for at in curve:
        at["ratio"] = round(at["tokens_per_second"] / base, 2)
        print(
            f"batch {at['batch']:3}: {at['tokens_per_second']:6.1f} tokens/s ({at['ratio']:.2f}x), "
            f"{at['mb_per_token']:5.1f} MB a token, link {at['link_share']:.0%} busy",
            flush=True,
        )
    picture = size.picture(NAME)
    draw(curve, picture)
    ratio = next(at["ratio"] for at in curve if at["batch"] == 16)
    detail = {"curve": curve, "link_gbps": LINK_GBPS, "cache": CACHE, "picture": picture.name}
    return Measurement(NAME, {"batch_16_over_1": ratio}, BAR, ratio >= 4, detail)


def point(batch: int, requests: list[Request], factor: int, **settings: Any) -> dict[str, Any]:
    """One engine, `batch` sequences at a time, over all of `requests`: generated tokens/s, prefills included."""
    options: dict[str, Any] = {
        "device": "cpu",
        "expert_cache": CACHE,
        "link_gbps": LINK_GBPS,
        "context": 512,
    } | settings
    with Engine.load(inflated(factor), batch=batch, **options) as engine:
        warm_up(engine, requests[0][1])
        before, started = engine.stats, time.perf_counter()
        replies = list(engine.generate_batch(requests))
        seconds = time.perf_counter() - started
        after = engine.stats
    assert len(replies) == len(requests)
    generated = after.tokens_generated - before.tokens_generated
    prompt = after.tokens_prompt - before.tokens_prompt
    moved = after.bytes_loaded - before.bytes_loaded
    return {
        "batch": batch,
        "requests": len(requests),
        "tokens_per_second": generated / seconds,
        "generated": generated,
        "prompt": prompt,
        "mb_per_token": moved / 1e6 / (generated + prompt),
        "moved_gb": moved / 1e9,
        "link_share": moved / 1e9 / seconds / options["link_gbps"],
        "seconds": seconds,
    }


def draw(curve: list[dict[str, Any]], path: Path) -> None:
    """The curve as a picture: tokens/s and bytes a token over the batch size."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    sizes = [str(at["batch"]) for at in curve]
    figure, (speed, traffic) = pyplot.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    for axes, key, title in ((speed, "tokens_per_second", "tokens/s"), (traffic, "mb_per_token", "MB moved a token")):
        values = [at[key] for at in curve]
        axes.plot(sizes, values, marker="o", color="#1f6f8b")
        for size, value in zip(sizes, values, strict=True):
            axes.annotate(f"{value:.0f}", (size, value), textcoords="offset points", xytext=(0, 7), ha="center")
        axes.set_title(title)
        axes.set_xlabel("sequences at a time")
        axes.set_ylim(0, 1.18 * max(values))
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)
