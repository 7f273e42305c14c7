"""`budget`: what an expert budget gains over exact speculation, at a loss that is measured."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from statistics import quantiles
from typing import Any

from bench.measurement import BaseSize, Measurement
from bench.support.alternating import alternate, loaded, questions
from bench.support.checkpoints import FACTOR, SMALL_FACTOR, inflated
from bench.support.link_cells import Cell
from edgemoe import Sampling
from edgemoe.demo.tasks import TASKS
from edgemoe.measure.evaluation import Evaluation, task_eval_texts
from edgemoe.measure.quality import Quality

NAME = "budget"
BAR = ">= 1.2x tokens/s of exact speculation at <= 1 point of task score and >= 98 % top-1 agreement"
CELL = Cell("25%", 1.0)
"""Where bytes are dear: a budget is for that."""
FEW: dict[str, Any] = {"tasks": ("repeat", "count"), "tokens": 6, "scored": 0, "predicted": 40}
"""What is asked in a small run."""
BUDGETS: dict[str, dict[str, Any]] = {
    f"{rule} {size}": {"budget": size, "budget_rule": rule}
    for rule, sizes in {"sum": ("12", "95%"), "path": ("95%",), "residency": ("3", "85%", "90%", "95%")}.items()
    for size in sizes
}
"""MoE-Spec's rule by its own count and by mass, the same by path probability, and residency first by both."""
AGREEMENT, LOST = 0.98, 1.0


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """How wide the experts are, what is tried, and what is asked."""

    factor: int = FACTOR
    budgets: tuple[str, ...] = tuple(BUDGETS)
    tasks: tuple[str, ...] = ()
    """Of the shipped model; all of them where none is named."""
    questions: int = 1
    """Of each task for the speed."""
    tokens: int = 48
    scored: int = 12
    """Held-out questions of each task for the score, where the agreement is good enough to ask; none lose none."""
    predicted: int = 1000
    """Tokens for the agreement."""


FULL, SMALL = Size(), Size(small=True, factor=SMALL_FACTOR, budgets=("sum 12", "residency 85%"), **FEW)


def run(size: Size = FULL) -> Measurement:
    """Decoding alone, warm, alternating with the default, which speculates exactly."""
    tried = {name: measure(CELL.settings, BUDGETS[name], size) for name in size.budgets}
    good = {
        name: at["speed"] for name, at in tried.items() if at["lost_points"] is not None and at["lost_points"] <= LOST
    }
    best = max(good, key=lambda name: good[name]) if good else None
    value = {"best": best, "speed": round(good[best], 3) if best else None}
    return Measurement(NAME, value, BAR, best is not None and good[best] >= 1.2, {"budgets": tried})


def measure(cell: dict[str, Any], own: dict[str, Any], size: Size) -> dict[str, Any]:
    """One budget: its speed over that of exact speculation, and what it costs."""
    sampling = Sampling(temperature=0, max_tokens=size.tokens)
    variants = {"exact": cell, "budget": cell | own}
    found = alternate(inflated(size.factor), variants, questions(size.questions, size.tasks), sampling)
    exact, budget = found["exact"], found["budget"]
    speed = budget.tokens / budget.total * exact.total / exact.tokens
    quality = cost(cell | own, size.predicted)
    lost = lost_points(cost(cell | own, size.predicted, size.scored)) if quality.agreement >= AGREEMENT else None
    ratios = [ours / theirs for ours, theirs in zip(budget.speeds, exact.speeds, strict=True) if theirs]
    at = {
        "speed": speed,
        "replies": len(ratios),
        "speed_quartiles": quantiles(ratios, method="inclusive"),
        "tokens_per_second": budget.tokens / budget.total,
        "exact_tokens_per_second": exact.tokens / exact.total,
        "mb_per_token": [each.grew("bytes_loaded") / each.tokens / 1e6 for each in (exact, budget)],
        "same_replies": sum(map(tuple.__eq__, exact.token_ids, budget.token_ids)) / len(exact.token_ids),
        "agreement": quality.agreement,
        "kl_mean": quality.kl_mean,
        "kl_99": quality.kl_99,
        "lost_points": lost,
        "scored": size.scored * len(TASKS),
    }
    print(
        f"{own['budget_rule'] + ' ' + own['budget']:16} {speed:.2f}x exact speculation; top-1 {quality.agreement:.2%}, "
        f"KL {quality.kl_mean:.4f} (99 %: {quality.kl_99:.3f}), points lost: {'-' if lost is None else round(lost, 1)}",
        flush=True,
    )
    return at


def cost(settings: dict[str, Any], predicted: int, scored: int = 0) -> Quality:
    """What `settings` cost in quality, of the shipped model, which routes as the widened one does, always drafting."""
    kept = {name: value for name, value in settings.items() if name not in ("link_gbps", "file_reads")}
    with (
        loaded(None, **kept | {"speculate": "ngram"}) as engine,
        closing(Evaluation(task_eval_texts(engine, predicted), scored)) as evaluation,
    ):
        evaluation.measure(engine)
        return evaluation.against(engine)


def lost_points(quality: Quality) -> float:
    """Percentage points of the score over all tasks that are lost."""
    asked = sum(task.asked for task in quality.tasks)
    return 100 * sum(task.exact_right - task.right for task in quality.tasks) / max(1, asked)
