"""`budget-curve`: what a budget gains and what it costs, from a tight one to one that holds everything."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.measurement import Measurement
from bench.speculation import budget
from bench.speculation.budget import CELL, FEW, measure
from bench.support.checkpoints import SMALL_FACTOR

NAME = "budget-curve"
BAR = "at least 6 points, and the one with everything gives the exact replies"
MAIN, OTHER, GREY = "#1f6f8b", "#e07a3f", "#8a8a8a"


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
    size.keep(NAME, points)
    exact = points["100%"]
    same = exact["same_replies"] == 1 and exact["kl_mean"] == 0 and exact["agreement"] == 1
    value = {"points": len(points), "exact_end_is_exact": same}
    return Measurement(NAME, value, BAR, same and len(points) >= 6, {"points": points, "picture": picture.name})


def draw(points: dict[str, dict[str, Any]], path: Path) -> None:
    """Speed above, loss below, over the share that is kept; each with what is no more than noise."""
    from matplotlib.figure import Figure

    shares = list(points)
    figure = Figure(figsize=(7.5, 8.5), layout="constrained")
    plots: Any = figure.subplots(3, 1, sharex=True)
    speed, agreement, divergence = plots
    _draw_speed(speed, points)
    _draw_agreement(agreement, points)
    divergence.plot(shares, [at["kl_mean"] for at in points.values()], "o-", color=MAIN, label="mean over tokens")
    tail = [at["kl_99"] for at in points.values()]
    divergence.plot(shares, tail, "s--", color=OTHER, label="99th percentile of tokens")
    divergence.set_yscale("symlog", linthresh=1e-4)
    divergence.set_ylim(0, 3 * max([*tail, 1e-4]))
    divergence.set_ylabel("KL divergence from exact (nats)")
    divergence.set_xlabel("share of the routing mass that a verification keeps, residency first")
    for axes in plots:
        axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    figure.suptitle(f"A budget on experts: inflated demo on a CPU, slots for {CELL.name}, batch 1", fontsize=11)
    figure.savefig(path, metadata={"Date": None})


def _draw_speed(axes: Any, points: dict[str, dict[str, Any]]) -> None:
    """The ratio over all replies together, with the range that the middle half of the replies has, where it is kept."""
    speeds, replies = [at["speed"] for at in points.values()], min(at["replies"] for at in points.values())
    label = f"{replies} replies together, one run"
    axes.plot(list(points), speeds, "o-", color=MAIN, label=label, zorder=3)
    known = {share: at["speed_quartiles"] for share, at in points.items() if "speed_quartiles" in at}
    if known:
        low, high = [each[0] for each in known.values()], [each[2] for each in known.values()]
        axes.vlines(list(known), low, high, color=MAIN, alpha=0.35, linewidth=6, label="middle half of the replies")
    axes.axhline(1.0, color=GREY, linewidth=1, linestyle=":", label="as fast as exact speculation")
    axes.set_ylabel("tokens/s over those of\nexact speculation (ratio)")


def _draw_agreement(axes: Any, points: dict[str, dict[str, Any]]) -> None:
    """Agreement on text, and the task score beside that of exact speculation with one question more and less."""
    shares = list(points)
    axes.plot(shares, [100 * at["agreement"] for at in points.values()], "o-", color=MAIN, label="top-1 agreement")
    scored = [share for share in shares if points[share]["lost_points"] is not None and points[share]["scored"]]
    lows = [100 * at["agreement"] for at in points.values()]
    if scored:
        kept = [-points[share]["lost_points"] + 100 for share in scored]
        questions = points[scored[0]]["scored"]
        label = f"task score, exact = 100, with one of {questions} questions more or less"
        axes.errorbar(scored, kept, yerr=100 / questions, fmt="s", capsize=4, color=OTHER, label=label)
        lows += [each - 100 / questions for each in kept]
    axes.axhline(100, color=GREY, linewidth=1, linestyle=":")
    axes.set_ylim(min(95, *lows) - 1, 103)
    axes.set_ylabel("top-1 agreement (%)\nand task score")
