"""`inverted-u`: speed-up over batch with all experts resident, for a sparse, the shipped and a dense routing."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bench.measurement import BaseSize, Measurement, work_folder
from bench.support.checkpoints import FACTOR, SMALL_FACTOR, inflated
from edgemoe.checkpoint.blueprint import open_blueprint
from edgemoe.config import EngineConfig
from edgemoe.measure.profiler import ProfilingRun, point, profiling_run
from edgemoe.measure.text_passes import PassReading
from edgemoe.plan import moesd

NAME = "inverted-u"
BAR = "speed-up over batch rises and falls where routing is sparse, and pays over a wider range the sparser it is"
TOP_K = {"sparse": 2, "shipped": 4, "dense": 32}
DEPTH = 3
ALPHA = 0.8
"""Probability of acceptance, the same at every point: only the time of passes is measured here."""
NEAR = 0.9
"""Share of its best speed-up from which a batch counts to the range of a variant."""
COLORS = {"sparse": "#1f6f8b", "shipped": "#7a9e3b", "dense": "#e07a3f"}


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """How wide the experts are, and where the speed-up is measured how often."""

    factor: int = FACTOR
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    rounds: int = 5


FULL, SMALL = Size(), Size(small=True, factor=SMALL_FACTOR, batches=(1, 4), rounds=1)


def run(size: Size = FULL) -> Measurement:
    """Plain steps and verifications of three drafted tokens in turns, at every batch of every variant. Warm."""
    readings = {name: measure(variant(name, top_k, size.factor), size) for name, top_k in TOP_K.items()}
    curves = {name: {batch: median(gains) for batch, gains in found.items()} for name, found in readings.items()}
    for name, curve in curves.items():
        gains = ", ".join(f"{batch}: {gain:.2f}" for batch, gain in curve.items())
        print(f"{name:8} top-{TOP_K[name]:<2} {gains}", flush=True)
    picture = size.picture(NAME)
    draw(readings, picture, size.rounds)
    size.keep(NAME, {"rounds": size.rounds, "readings": readings})
    peaks = {name: max(curve, key=lambda batch: curve[batch]) for name, curve in curves.items()}
    widths = {name: width(curve) for name, curve in curves.items()}
    bows = all(1 < peaks[name] < size.batches[-1] for name in ("sparse", "shipped"))
    ok = bows and widths["sparse"] >= widths["shipped"] >= widths["dense"] and peaks["sparse"] >= peaks["dense"]
    value = {"peaks": peaks, "doublings_near_the_peak": {name: round(each, 1) for name, each in widths.items()}}
    detail = {"curves": curves, "readings": readings, "top_k": TOP_K, "depth": DEPTH, "alpha": ALPHA}
    return Measurement(NAME, value, BAR, ok, detail | {"picture": picture.name})


def variant(name: str, top_k: int, factor: int) -> Path:
    """The inflated demo with another number of experts a token. Its files are links, its text is not worth reading."""
    source = inflated(factor)
    folder = work_folder() / f"{source.name}-{name}"
    folder.mkdir(exist_ok=True)
    for file in source.iterdir():
        link = folder / file.name
        if file.name != "config.json" and not link.exists():
            link.symlink_to(file)
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": top_k}, indent=2))
    return folder


def measure(folder: Path, size: Size) -> dict[int, list[float]]:
    """The speed-ups at every batch, one a round: seconds as measured, tokens per cycle by `ALPHA`."""
    with profiling_run(
        open_blueprint(folder), EngineConfig(device="cpu", expert_cache="100%"), lambda progress: None
    ) as at:
        turns = [
            {batch: _speedup(at, batch, turn * at.sequences // size.rounds) for batch in size.batches}
            for turn in range(size.rounds)
        ]
    return {batch: [gains[batch] for gains in turns] for batch in size.batches}


def _speedup(at: ProfilingRun, batch: int, first: int) -> float:
    """Of one round, which reads the texts from number `first` on."""
    readings: list[list[PassReading]] = []
    for tokens in (1, DEPTH + 1):
        at.passes.run(first, batch, tokens)
        readings.append([at.passes.run(first, batch, tokens) for _ in range(max(2, min(8, 32 // batch)))])
    plain, verify = (
        point(at.plan, batch, tokens, found) for tokens, found in zip((1, DEPTH + 1), readings, strict=True)
    )
    gained = moesd.tokens_per_cycle(ALPHA, DEPTH)
    return moesd.speedup(gained, plain.seconds, verify.draft_seconds, verify.seconds, verify.reject_seconds)


def width(curve: dict[int, float]) -> float:
    """Doublings of the batch over which the speed-up is near its best, between points on straight lines."""
    least, total = NEAR * max(curve.values()), 0.0
    batches = list(curve)
    for left, right in zip(batches, batches[1:], strict=False):
        gains = sorted((curve[left], curve[right]))
        if gains[1] > least:
            inside = 1.0 if gains[0] >= least else (gains[1] - least) / (gains[1] - gains[0])
            total += inside * math.log2(right / left)
    return total


def draw(readings: dict[str, dict[int, list[float]]], path: Path, rounds: int) -> None:
    """A plot a variant with axes of its own, since one is flat beside another: the median, and each round as a dot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 3.9), layout="constrained")
    plots: Any = figure.subplots(1, len(readings), sharex=True)
    for axes, (name, found) in zip(plots, readings.items(), strict=True):
        batches, middle = list(found), [median(gains) for gains in found.values()]
        dots = [(batch, gain) for batch, gains in found.items() for gain in gains]
        if len(dots) > len(batches):
            axes.plot(*zip(*dots, strict=True), "o", color=COLORS[name], alpha=0.3, markersize=4, label="one round")
        axes.plot(batches, middle, "o-", color=COLORS[name], label=f"median of {rounds} rounds")
        best = max(range(len(batches)), key=lambda place: middle[place])
        axes.axhspan(
            NEAR * middle[best], middle[best], color="#000000", alpha=0.07, label=f"within {1 - NEAR:.0%} of best"
        )
        axes.annotate(
            f"best: {middle[best]:.2f} at {batches[best]}", (batches[best], middle[best]), xytext=(6, 8),
            textcoords="offset points", fontsize=9,
        )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_xticks(batches, labels=[str(batch) for batch in batches])
        axes.minorticks_off()
        lowest, highest = min(gain for _, gain in dots), max(gain for _, gain in dots)
        room = 0.12 * (highest - lowest)
        axes.set_ylim(lowest - room, highest + 2 * room)
        axes.set_xlabel("sequences in the batch")
        axes.set_title(f"{name}: {TOP_K[name]} of 32 experts a token", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    plots[0].set_ylabel("speed-up over plain steps (ratio)")
    figure.suptitle(
        f"Inflated demo on a CPU, all experts resident: speed-up with {DEPTH} drafted tokens, {ALPHA:.0%} right. "
        "Each plot has its own scale.",
        fontsize=10,
    )
    figure.savefig(path, metadata={"Date": None})
