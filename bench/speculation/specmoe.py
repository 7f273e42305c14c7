"""`specmoe`: the regime of SpecMoE's headline: large batches, long replies, experts off the device."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from bench.measurement import BaseSize, Measurement
from bench.support.alternating import loaded, warm_up
from bench.support.checkpoints import SMALL_FACTOR, inflated
from bench.support.link_cells import ON_DEMAND
from bench.support.workload import Request, drafting_rates, mixed
from edgemoe import Engine
from edgemoe.config import MIB
from edgemoe.results import Stats

NAME = "specmoe"
BAR = (
    "batch 256: >= 4.3x loading on demand, with <= 23% of its transfers; batch 32: >= 1.2x the same without drafts; "
    "replies of 256 tokens, cache 10% and 25%"
)
FACTOR = 32
"""Experts of 3.5 MB: a quarter of the usual ones, and so is the link, that a step takes a quarter of the time."""
LINK_GBPS = 0.25
WORKSPACE = 512 * MIB
"""For activations: with a hundred sequences and more, a verification has more tokens than a usual part of a prompt."""
DRAFTS: dict[str, dict[str, Any]] = {
    "no drafts": {"speculate": "off"},
    "default": {},
    "head": {"speculate": "ngram+mtp", "draft_shape": "chain"},
    "self": {"speculate": "ngram+self", "draft_shape": "chain"},
}
PAPER = {256: 4.3}
"""SpecMoE's speed-up over loading on demand by batch size (arXiv 2604.10152): NLLB-MoE on an H100, the one size that
its abstract gives."""


class Window(NamedTuple):
    """Tokens of each reply between which speed and bytes are measured: all sequences decode, none begins or ends."""

    first: int
    last: int


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """How wide the experts are, the batches, the caches and the replies."""

    factor: int = FACTOR
    batches: tuple[int, ...] = (32, 128, 256)
    caches: tuple[str, ...] = ("10%", "25%")
    tokens: int = 256
    windows: Mapping[int, Window] = field(
        default_factory=lambda: {32: Window(16, 112), 128: Window(16, 80), 256: Window(8, 56)}
    )
    """By batch; a part of the replies, which takes minutes as it is."""


FULL, SMALL = (
    Size(),
    Size(small=True, factor=SMALL_FACTOR, batches=(3,), caches=("25%",), tokens=10, windows={3: Window(2, 8)}),
)


def run(size: Size = FULL) -> Measurement:
    """All tasks mixed; replies do not end before their length, so that nobody waits for the last ones."""
    rows = [row for batch in size.batches for row in _rows(batch, size)]
    best = {batch: max(row["ratio"] for row in rows if row["batch"] == batch) for batch in size.batches}
    drafted = {batch: max(row["over_plain"] for row in rows if row["batch"] == batch) for batch in size.batches}
    volume = {batch: min(row["volume"] for row in rows if row["batch"] == batch) for batch in size.batches}
    largest, smallest = max(size.batches), min(size.batches)
    ok = best[largest] >= 4.3 and volume[largest] <= 0.23 and drafted[smallest] >= 1.2
    value = {
        f"batch_{largest}": round(best[largest], 2),
        f"transfers_{largest}": round(volume[largest], 3),
        f"batch_{smallest}_over_no_drafts": round(drafted[smallest], 2),
    }
    draw(size.picture(NAME), best, rows)
    size.keep(NAME, rows)
    detail = {"rows": rows, "link_gbps": LINK_GBPS, "factor": size.factor, "tokens": size.tokens, "paper": PAPER}
    return Measurement(NAME, value, BAR, ok, detail)


def _rows(batch: int, size: Size) -> list[dict[str, Any]]:
    requests = mixed(batch, size.tokens, ignore_eos=True)
    demand = point("on demand", batch, requests, size, ON_DEMAND)
    rows = [demand | {"ratio": 1.0, "volume": 1.0, "over_plain": 0.0}]
    for cache in size.caches:
        plain = None
        for name, drafts in DRAFTS.items():
            row = point(name, batch, requests, size, {"expert_cache": cache, **drafts})
            plain = plain or row
            row["ratio"] = row["tokens_per_second"] / demand["tokens_per_second"]
            row["volume"] = row["mb_per_token"] / demand["mb_per_token"]
            row["over_plain"] = row["tokens_per_second"] / plain["tokens_per_second"]
            rows.append(row)
            print(
                f"batch {batch:3} {cache:>4} {name:10} {row['tokens_per_second']:6.1f} tokens/s ({row['ratio']:.2f}x "
                f"on demand, {row['over_plain']:.2f}x no drafts), {row['mb_per_token']:5.2f} MB a token "
                f"({row['volume']:.0%}), {row['tokens_per_cycle']:.2f} tokens a cycle, link {row['link_share']:.0%}",
                flush=True,
            )
    return rows


def point(name: str, batch: int, requests: list[Request], size: Size, settings: Mapping[str, Any]) -> dict[str, Any]:
    """One engine that has all of `requests` at once, between the tokens of the window."""
    options = {"link_gbps": LINK_GBPS, "batch": batch, "prefill_workspace": WORKSPACE} | dict(settings)
    with loaded(inflated(size.factor), **options) as engine:
        warm_up(engine, requests[0][1])
        before, after, seconds = _measured(engine, requests, size.windows[batch])
    row = {"name": name, "batch": batch, "cache": str(settings["expert_cache"])}
    return row | drafting_rates(before, after, seconds, LINK_GBPS)


def _measured(engine: Engine, requests: list[Request], window: Window) -> tuple[Stats, Stats, float]:
    """The engine's totals at both ends of the window, and the seconds between them. The rest is cancelled."""
    begun = engine.stats.tokens_generated
    worker = threading.Thread(target=lambda: list(engine.generate_batch(requests)))
    worker.start()

    def wait_for(tokens: int) -> tuple[Stats, float]:
        while worker.is_alive() and engine.stats.tokens_generated - begun < tokens * len(requests):
            time.sleep(0.01)
        return engine.stats, time.perf_counter()

    before, first = wait_for(window.first)
    after, last = wait_for(window.last)
    engine.cancel()
    worker.join()
    return before, after, last - first


def draw(path: Path, best: Mapping[int, float], rows: list[dict[str, Any]]) -> None:
    """Speed over loading on demand by batch size, beside SpecMoE's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(list(PAPER), list(PAPER.values()), "*", color="#555555", markersize=12, label="SpecMoE, on an H100")
    for name in DRAFTS:
        points = [
            (batch, max(row["ratio"] for row in rows if row["batch"] == batch and row["name"] == name))
            for batch in best
        ]
        axes.plot(*zip(*points, strict=True), "o-", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("sequences at once")
    axes.set_ylabel("tokens/s over loading on demand")
    axes.set_xticks(list(best), [str(batch) for batch in best])
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, metadata={"Date": None})
