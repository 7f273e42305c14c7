"""`budget-curve`: what a budget gains and what it costs, from a tight one to one that holds everything."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bench.measurement import Measurement
from bench.speculation import budget
from bench.speculation.budget import CELL, FEW, measure
from bench.support.checkpoints import SMALL_FACTOR

NAME = "budget-curve"
BAR = "at least 6 points, and the one with everything gives the exact replies"
SPEED, AGREEMENT, SCORE, TAIL, GREY = "#1f6f8b", "#1f6f8b", "#e07a3f", "#e07a3f", "#8a8a8a"


@dataclass(frozen=True, kw_only=True)
class Size(budget.Size):
    """As of `budget`, and the shares of the routing mass that are tried."""

    shares: tuple[str, ...] = ("60%", "75%", "85%", "90%", "95%", "100%")
    questions: int = 3


FULL, SMALL = Size(), Size(small=True, factor=SMALL_FACTOR, questions=1, shares=("60%", "100%"), **FEW)


def run(size: Size = FULL) -> Measurement:
    """Residency first, by the share of the routing mass. As `budget`, and drawn."""
    points = {
        share: measure(CELL.settings, {"budget": share, "budget_rule": "residency"}, size) for share in size.shares
    }
    picture = size.picture(NAME)
    draw(points, picture)
    exact = points["100%"]
    same = exact["same_replies"] == 1 and exact["kl_mean"] == 0 and exact["agreement"] == 1
    value = {"points": len(points), "exact_end_is_exact": same}
    return Measurement(NAME, value, BAR, same and len(points) >= 6, {"points": points, "picture": picture.name})


def draw(points: dict[str, dict[str, Any]], path: Path) -> None:
    """Speed above, loss below, over the share that is kept."""
    from matplotlib.figure import Figure

    shares = list(points)
    figure = Figure(figsize=(7.5, 8.5), layout="constrained")
    plots: Any = figure.subplots(3, 1, sharex=True)
    speed, agreement, divergence = plots
    _draw_speed(speed, points)
    agreement.plot(shares, _percent(points, "agreement"), "o-", color=AGREEMENT, label="top-1 agreement (eval text)")
    scored = [share for share in shares if points[share]["lost_points"] is not None]
    kept = [100 - points[share]["lost_points"] for share in scored]
    agreement.plot(scored, kept, "s--", color=SCORE, label="task score kept (100 % less points lost)")
    agreement.set_ylabel("agreement with exact\nspeculation (%)")
    divergence.plot(shares, [at["kl_mean"] for at in points.values()], "o-", color=AGREEMENT, label="mean")
    tail = [at["kl_99"] for at in points.values()]
    divergence.plot(shares, tail, "s--", color=TAIL, label="99th percentile of tokens")
    divergence.set_yscale("symlog", linthresh=1e-4)
    divergence.set_ylabel("KL divergence (nats)")
    divergence.set_xlabel("share of the routing mass that a verification keeps, residency first (%)")
    for axes in plots:
        axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    figure.suptitle(f"A budget on experts, inflated demo on a CPU: {CELL.name}, batch 1", fontsize=11)
    figure.savefig(path, metadata={"Date": None})


def _draw_speed(axes: Any, points: dict[str, dict[str, Any]]) -> None:
    """The median over the replies, with the range that the middle half of them is in: what is within it is noise."""
    quartiles = [at["speed_quartiles"] for at in points.values()]
    middle = [half for _, half, _ in quartiles]
    around = [[half - low for low, half, _ in quartiles], [high - half for _, half, high in quartiles]]
    replies = median(at["replies"] for at in points.values())
    label = f"median of {replies:.0f} replies, with the middle half"
    axes.errorbar(list(points), middle, yerr=around, fmt="o-", capsize=4, color=SPEED, label=label)
    axes.axhline(1.0, color=GREY, linewidth=1, linestyle=":", label="as fast as exact speculation")
    axes.set_ylabel("tokens/s over those of\nexact speculation (ratio)")


def _percent(points: dict[str, dict[str, Any]], name: str) -> list[float]:
    return [100 * at[name] for at in points.values()]
