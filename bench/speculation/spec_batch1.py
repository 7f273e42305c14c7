"""`spec-batch1`: prefetching and drafts at batch 1, over caches and links, against demanded loads alone."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import geometric_mean
from typing import Any

from bench.measurement import BaseSize, Measurement
from bench.support.alternating import Answers, alternate, questions
from bench.support.checkpoints import FACTOR, SMALL_FACTOR, inflated
from bench.support.link_cells import CELLS, PLAIN, Cell, link_nbytes_per_token
from edgemoe import Sampling

NAME = "spec-batch1"
BAR = (
    "geometric mean >= 1.25x where the link takes 0.5 to 2 times the computing; the default >= 0.95x everywhere; "
    "copying, all resident, n-grams >= 1.5x"
)
COPYING = ("repeat", "replace")
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "default": {},
    "drafts": {"prefetch": "off"},
    "prefetch": {"speculate": "off"},
    "self": {"speculate": "auto+self"},
}
"""Against the first: the default, each half of it alone, and with drafts of the model itself."""


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """Cells, how wide the experts are, and what is asked in each."""

    cells: tuple[Cell, ...] = tuple(CELLS)
    factor: int = FACTOR
    tasks: tuple[str, ...] = ()
    """Of the shipped model; all of them where none is named."""
    tokens: int = 40

    @property
    def sampling(self) -> Sampling:
        """Greedy replies."""
        return Sampling(temperature=0, max_tokens=self.tokens)


FULL, SMALL = Size(), Size(small=True, cells=(Cell("25%", 4.0),), factor=SMALL_FACTOR, tasks=COPYING, tokens=6)


def run(size: Size = FULL) -> Measurement:
    """One held-out question of every task in every cell; decoding alone, warm, alternating."""
    resident = alternate(
        inflated(size.factor), {"plain": PLAIN, "default": {}}, questions(2, size.tasks), size.sampling
    )
    computing = resident["plain"].total / resident["plain"].tokens
    copying = _ratio(resident, "default", COPYING)
    cells = [measure(cell, computing, size) for cell in size.cells]
    near = [at["best"] for at in cells if 0.5 <= at["link_over_computing"] <= 2]
    mean = geometric_mean(near) if near else 0.0
    worst = min(at["default"] for at in [*cells, {"default": _ratio(resident, "default")}])
    value = {"geometric_mean": round(mean, 3), "worst_default": round(worst, 3), "copying": round(copying, 3)}
    detail = {"cells": cells, "near": len(near), "computing_ms": 1e3 * computing}
    return Measurement(NAME, value, BAR, mean >= 1.25 and worst >= 0.95 and copying >= 1.5, detail)


def measure(cell: Cell, computing: float, size: Size) -> dict[str, Any]:
    """One cell: each variant's speed over the plain one's, and how long the link takes beside the computing."""
    variants = {name: cell.settings | own for name, own in VARIANTS.items()}
    found = alternate(inflated(size.factor), variants, questions(1, size.tasks), size.sampling)
    plain = found["plain"]
    speeds = {name: _ratio(found, name) for name in VARIANTS if name != "plain"}
    speed = cell.gbps * 1e9 if cell.gbps else _disk_speed(plain)
    link = link_nbytes_per_token(plain) / speed
    at = {
        "cell": cell.name,
        "plain_ms": 1e3 * plain.total / plain.tokens,
        "link_over_computing": link / computing,
        **speeds,
        "best": max(speeds.values()),
        "mb_per_token": {name: link_nbytes_per_token(answers) / 1e6 for name, answers in found.items()},
    }
    shown = ", ".join(f"{name} {speeds[name]:.2f}x" for name in speeds)
    print(
        f"{cell.name:32} plain {at['plain_ms']:6.1f} ms, link {link / computing:.2f} of computing: {shown}", flush=True
    )
    return at


def _disk_speed(plain: Answers) -> float:
    """Bytes a second of the disk while it was waited for."""
    return plain.grew("bytes_loaded") / max(plain.grew("link_wait_seconds"), 1e-9)


def _ratio(found: dict[str, Answers], name: str, tasks: tuple[str, ...] = ()) -> float:
    """How many times as fast `name` was as the plain variant, over all of the time or that of `tasks`."""
    plain, other = found["plain"].seconds, found[name].seconds
    chosen = tasks or tuple(plain)
    return sum(plain[task] for task in chosen) / sum(other[task] for task in chosen)
