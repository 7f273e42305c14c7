"""Draws a profile: measured points and the fitted model. Needs matplotlib (the extra `plot`)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgemoe.plan import moesd
from edgemoe.plan.prediction import ACCEPTANCE
from edgemoe.plan.profile import Profile, ProfilePoint

DEPTHS = (3, 8)
BATCHES = tuple(2 ** (eighths / 8) for eighths in range(49))
"""1 to 64 in steps of an eighth of a power of two: points of the curves."""
COLORS, MARKERS = ("#1f6f8b", "#e07a3f"), ("o", "s")
GREY = "#8a8a8a"


def draw(profile: Profile, path: Path) -> None:
    """Writes the picture to `path`, in the format of its suffix. Raises OSError if that fails."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.6), layout="constrained")
    gains, efficiency, roof = figure.subplots(1, 3)
    _draw_over_batch(gains, profile, _speedup, f"Speed-up at {ACCEPTANCE:.0%} acceptance")
    gains.set_ylabel("tokens/s over those of plain steps (ratio)", fontsize=9)
    _draw_over_batch(efficiency, profile, _efficiency, "Target efficiency")
    efficiency.set_ylabel("time of a plain step over that of a verification (ratio)", fontsize=9)
    _draw_roofline(roof, profile)
    where = profile.conditions
    figure.suptitle(
        f"Profile taken on {profile.taken}: {where.processor if where.device == 'cpu' else where.device}, "
        f"{where.threads} threads, {where.dtype}",
        fontsize=10,
    )
    for axes in (gains, efficiency, roof):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)


def _speedup(depth: int, plain: float, verify: float, overhead: float) -> float:
    return moesd.speedup(moesd.tokens_per_cycle(ACCEPTANCE, depth), plain, overhead, verify, 0.0)


def _efficiency(depth: int, plain: float, verify: float, overhead: float) -> float:
    return moesd.target_efficiency(plain, verify)


def _draw_over_batch(axes: Any, profile: Profile, value: Any, title: str) -> None:
    """Draws `value` over the batch with the largest measured cache: the model as lines, measurements as circles."""
    model, share = profile.model, max(point.cache_share for point in profile.points)
    for depth, color, marker in zip(DEPTHS, COLORS, MARKERS, strict=True):
        curve = []
        for batch in BATCHES:
            rates = [model.hit_rate(share, batch, tokens) for tokens in (1, depth + 1)]
            plain, verify = model.step_seconds(batch, 1, rates[0]), model.step_seconds(batch, depth + 1, rates[1])
            overhead = model.cycle_seconds(batch, depth, rates[1]) - verify
            curve.append(value(depth, plain, verify, overhead))
        axes.plot(BATCHES, curve, color=color, label=f"{depth} drafted, model")
        pairs = list(_pairs(profile, share, depth))
        measured = [
            value(depth, plain.seconds, verify.seconds, verify.draft_seconds + verify.reject_seconds)
            for plain, verify in pairs
        ]
        batches = [plain.batch for plain, _ in pairs]
        axes.plot(batches, measured, marker, color=color, label=f"{depth} drafted, measured")
    axes.axhline(1.0, color=GREY, linewidth=1, linestyle=":", label="as a plain step")
    axes.set_xscale("log", base=2)
    axes.set_xticks([1, 2, 4, 8, 16, 32, 64], labels=["1", "2", "4", "8", "16", "32", "64"])
    axes.set_ylim(bottom=0)
    axes.minorticks_off()
    axes.set_xlabel("sequences in the batch", fontsize=9)
    axes.set_title(title, fontsize=10)
    _legend_below(axes)


def _legend_below(axes: Any) -> None:
    """A legend that hides no point: where they lie depends on the machine."""
    axes.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)


def _pairs(profile: Profile, share: float, depth: int) -> Iterator[tuple[ProfilePoint, ProfilePoint]]:
    """The measured plain steps whose verification of `depth` drafted tokens was measured too, each with that."""
    found = {(point.batch, point.tokens): point for point in profile.points if point.cache_share == share}
    for (batch, tokens), plain in found.items():
        if tokens == 1 and (batch, depth + 1) in found:
            yield plain, found[batch, depth + 1]


def _draw_roofline(axes: Any, profile: Profile) -> None:
    """Draws each pass by its arithmetic intensity and speed, under the two measured ceilings."""
    speed = profile.model.speed
    resident = [point for point in profile.points if not point.misses]
    for number, (points, label) in enumerate(
        ((resident, "pass, all experts resident"), (_missing(profile), "pass with missing experts"))
    ):
        if points:
            positions = [_position(profile, point) for point in points]
            axes.plot(*zip(*positions, strict=True), MARKERS[number], color=COLORS[number], label=label)
    ridge = speed.arithmetic / speed.memory
    ends = [min([ridge / 16, *(_position(profile, point)[0] for point in profile.points)]), 16 * ridge]
    axes.plot(
        [ends[0], ridge, ends[1]],
        [ends[0] * speed.memory / 1e9, speed.arithmetic / 1e9, speed.arithmetic / 1e9],
        color=GREY,
        label=f"measured ceilings: {speed.memory / 1e9:.0f} GB/s, {speed.arithmetic / 1e9:.0f} GFLOP/s",
    )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOP per byte of weights", fontsize=9)
    axes.set_ylabel("GFLOP/s", fontsize=9)
    axes.set_title("Roofline", fontsize=10)
    _legend_below(axes)


def _missing(profile: Profile) -> list[ProfilePoint]:
    return [point for point in profile.points if point.misses]


def _position(profile: Profile, point: ProfilePoint) -> tuple[float, float]:
    """FLOP per byte of weights, and GFLOP/s, of a pass; each token takes two operations per weight that it uses."""
    shape = profile.model.shape
    record = shape.layers * shape.record_nbytes
    operations = 2 / shape.itemsize * point.total * (shape.dense_nbytes + shape.top_k * record)
    return operations / (shape.dense_nbytes + point.experts * record), operations / point.seconds / 1e9
