"""`inverted-u`: speed-up over batch with all experts resident, for a sparse, the shipped and a dense routing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import median
from typing import Any

from bench.measurement import Measurement, work_folder
from bench.support.checkpoints import inflated
from edgemoe.checkpoint.blueprint import open_blueprint
from edgemoe.config import EngineConfig
from edgemoe.measure.profiler import ProfilingRun, point, profiling_run
from edgemoe.measure.text_passes import PassReading
from edgemoe.plan import moesd

NAME = "inverted-u"
BAR = "speed-up over batch rises and falls where routing is sparse, and pays over a wider range the sparser it is"
TOP_K = {"sparse": 2, "shipped": 4, "dense": 32}
BATCHES = (1, 2, 4, 8, 16, 32, 64)
DEPTH = 3
ALPHA = 0.8
"""Probability of acceptance, the same at every point: only the time of passes is measured here."""
ROUNDS = 5
NEAR = 0.9
"""Share of its best speed-up from which a batch counts to the range of a variant."""
PICTURE = Path(__file__).parents[2] / "docs" / "benchmarks" / "inverted-u.svg"
COLORS = {"sparse": "#1f6f8b", "shipped": "#7a9e3b", "dense": "#e07a3f"}


def run() -> Measurement:
    """Plain steps and verifications of three drafted tokens in turns, at every batch of every variant. Warm."""
    curves = {name: measure(variant(name, top_k)) for name, top_k in TOP_K.items()}
    for name, curve in curves.items():
        gains = ", ".join(f"{batch}: {gain:.2f}" for batch, gain in curve.items())
        print(f"{name:8} top-{TOP_K[name]:<2} {gains}", flush=True)
    draw(curves, PICTURE)
    peaks = {name: max(curve, key=lambda batch: curve[batch]) for name, curve in curves.items()}
    widths = {name: width(curve) for name, curve in curves.items()}
    bows = all(1 < peaks[name] < BATCHES[-1] for name in ("sparse", "shipped"))
    ok = bows and widths["sparse"] >= widths["shipped"] >= widths["dense"] and peaks["sparse"] >= peaks["dense"]
    value = {"peaks": peaks, "doublings_near_the_peak": {name: round(each, 1) for name, each in widths.items()}}
    detail = {"curves": curves, "top_k": TOP_K, "depth": DEPTH, "alpha": ALPHA, "picture": PICTURE.name}
    return Measurement(NAME, value, BAR, ok, detail)


def variant(name: str, top_k: int) -> Path:
    """The inflated demo with another number of experts a token. Its files are links, its text is not worth reading."""
    source, folder = inflated(), work_folder() / f"inflated-{name}"
    folder.mkdir(exist_ok=True)
    for file in source.iterdir():
        link = folder / file.name
        if file.name != "config.json" and not link.exists():
            link.symlink_to(file)
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": top_k}, indent=2))
    return folder


def measure(folder: Path) -> dict[int, float]:
    """The speed-up at every batch, the median over the rounds: seconds as measured, tokens per cycle by `ALPHA`."""
    with profiling_run(
        open_blueprint(folder), EngineConfig(device="cpu", expert_cache="100%"), lambda progress: None
    ) as at:
        turns = [{batch: _speedup(at, batch, turn) for batch in BATCHES} for turn in range(ROUNDS)]
    return {batch: median(gains[batch] for gains in turns) for batch in BATCHES}


def _speedup(at: ProfilingRun, batch: int, turn: int) -> float:
    readings: list[list[PassReading]] = []
    for tokens in (1, DEPTH + 1):
        first = turn * at.sequences // ROUNDS
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


def draw(curves: dict[str, dict[int, float]], path: Path) -> None:
    """The curves, one line a variant."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    axes: Any = figure.subplots()
    for name, curve in curves.items():
        axes.plot(list(curve), list(curve.values()), marker="o", color=COLORS[name], label=f"{name}, top-{TOP_K[name]}")
    axes.axhline(1.0, color="#8a8a8a", linewidth=0.8, linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set_xticks(BATCHES, labels=[str(batch) for batch in BATCHES])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("sequences")
    axes.set_title(f"speed-up with {DEPTH} drafted tokens, {ALPHA:.0%} of them right", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None})
