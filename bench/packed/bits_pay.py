"""`bits-pay`: the widened shipped model in 16, 8 and 4 bits with one cache size, over the disk and a 4 GB/s link."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bench.measurement import BaseSize, Measurement
from bench.support.alternating import Answers, alternate, questions
from bench.support.checkpoints import FACTOR, SMALL_FACTOR
from bench.support.link_cells import PLAIN, Cell, link_nbytes_per_token
from bench.support.packed_models import inflated_variants
from edgemoe import Sampling

NAME = "bits-pay"
BAR = "bytes a token of bf16's: Q8_0 <= 0.55, 4 bits <= 0.30; tokens/s: >= 1.7x and >= 2.5x, over disk and 4 GB/s"
BARS = {"Q8_0": (0.55, 1.7), "int4": (0.30, 2.5)}


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """How wide the experts are, the cache, and what is asked."""

    factor: int = FACTOR
    cache: str = "1GiB"
    questions: int = 2
    tokens: int = 48


FULL, SMALL = Size(), Size(small=True, factor=SMALL_FACTOR, cache="40%", questions=1, tokens=4)


def run(size: Size = FULL) -> Measurement:
    """Held-out questions of every task, greedily, without drafts. Decoding alone, warm; the engines take turns."""
    sampling = Sampling(temperature=0.0, max_tokens=size.tokens, ignore_eos=True)
    variants = inflated_variants(size.factor)
    figures: dict[str, Any] = {}
    missed: list[str] = []
    for gbps in (None, 4.0):
        cell = Cell(size.cache, gbps)
        settings = {name: {**cell.settings, **PLAIN, **own} for name, own in variants.items()}
        found = alternate(None, settings, questions(size.questions), sampling)
        figures[cell.name] = _compared(found)
        for name, (most, least) in BARS.items():
            at = figures[cell.name][name]
            if at["bytes of bf16's"] > most or at["speed over bf16"] < least:
                missed.append(f"{name}, {cell.name}")
    return Measurement(NAME, {"missed": missed} | figures, BAR, not missed)


def _compared(found: dict[str, Answers]) -> dict[str, Any]:
    plain = found["bf16"]
    speed, nbytes = plain.tokens / plain.total, link_nbytes_per_token(plain)
    compared: dict[str, Any] = {"bf16": {"tokens/s": round(speed, 2), "MB a token": round(nbytes / 1e6, 1)}}
    for name, own in found.items():
        if name != "bf16":
            compared[name] = {
                "tokens/s": round(own.tokens / own.total, 2),
                "speed over bf16": round(own.tokens / own.total / speed, 2),
                "bytes of bf16's": round(link_nbytes_per_token(own) / max(nbytes, 1.0), 3),
            }
    return compared
