"""`budget-curve`: what a budget gains and what it costs, from a tight one to one that holds everything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.measurement import Measurement
from bench.speculation.budget import CELL, measure
from bench.support.checkpoints import inflated

NAME = "budget-curve"
BAR = "at least 6 points, and the one with everything gives the exact replies"
SHARES = ("60%", "75%", "85%", "90%", "95%", "100%")
PICTURE = Path(__file__).parents[2] / "docs" / "benchmarks" / "budget-curve.svg"


def run() -> Measurement:
    """Residency first, by the share of the routing mass. As `budget`, and drawn."""
    model = inflated()
    points = {share: measure(model, CELL.settings, {"budget": share, "budget_rule": "residency"}) for share in SHARES}
    draw(points)
    exact = points["100%"]
    same = exact["same_replies"] == 1 and exact["kl_mean"] == 0 and exact["agreement"] == 1
    value = {"points": len(points), "exact_end_is_exact": same}
    return Measurement(NAME, value, BAR, same and len(points) >= 6, {"points": points})


def draw(points: dict[str, dict[str, Any]]) -> None:
    """Speed above, loss below, over the share that is kept."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    shares = list(points)
    figure, (speed, agreement, divergence) = pyplot.subplots(3, 1, sharex=True, figsize=(7, 7), layout="constrained")
    speed.plot(shares, [at["speed"] for at in points.values()], "o-")
    speed.axhline(1.0, color="grey", linewidth=0.8)
    speed.set_ylabel("tokens/s over those of\nexact speculation")
    agreement.plot(
        shares, [100 * at["agreement"] for at in points.values()], "o-", color="tab:green", label="top-1 agreement"
    )
    scored = [share for share in shares if points[share]["lost_points"] is not None]
    kept = [100 - points[share]["lost_points"] for share in scored]
    agreement.plot(scored, kept, "s--", color="tab:olive", label="task score kept")
    agreement.set_ylabel("%")
    agreement.legend()
    divergence.plot(shares, [at["kl_mean"] for at in points.values()], "o-", color="tab:red", label="mean")
    divergence.plot(shares, [at["kl_99"] for at in points.values()], "s--", color="tab:orange", label="99th percentile")
    divergence.set_yscale("symlog", linthresh=1e-4)
    divergence.set_ylabel("KL divergence (nats)")
    divergence.set_xlabel("share of the routing mass that a verification keeps, residency first")
    divergence.legend()
    speed.set_title(f"A budget on experts: {CELL.name}, batch 1")
    figure.savefig(PICTURE, metadata={"Date": None})
