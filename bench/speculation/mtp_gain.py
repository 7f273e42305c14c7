"""`mtp-gain`: the shipped model's own draft head against no drafts, and against the default without it."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import geometric_mean
from typing import Any

from bench.measurement import BaseSize, Measurement
from bench.support.alternating import Answers, alternate, questions
from bench.support.checkpoints import FACTOR, SMALL_FACTOR, inflated
from bench.support.link_cells import Cell
from edgemoe import Sampling

NAME = "mtp-gain"
BAR = "batch 1, every task: mean >= 1.3x no drafts and >= 1.1x the default without a head; worst >= 0.97x"
FORMATS = ("native", "int4")
CELLS = tuple(Cell(cache, gbps) for cache in ("25%", "50%", "100%") for gbps in (None, 4.0) if cache != "100%" or gbps)
"""With every expert resident no link is used, so that one cell stands for both."""
WARMING = 1
"""Questions of each task before those that count."""


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """Cells, formats, how wide the experts are, and what is asked in each."""

    cells: tuple[Cell, ...] = CELLS
    formats: tuple[str, ...] = FORMATS
    factor: int = FACTOR
    tasks: tuple[str, ...] = ()
    """Of the shipped model; all of them where none is named."""
    questions: int = 3
    """Of each task: each is asked once, since an engine may draft from what it wrote."""
    tokens: int = 48


FULL = Size()
SMALL = Size(
    small=True,
    cells=CELLS[1:2],
    formats=("native",),
    factor=SMALL_FACTOR,
    tasks=("repeat", "count"),
    questions=1,
    tokens=6,
)


def run(size: Size = FULL) -> Measurement:
    """Decoding alone, warm, greedy, alternating."""
    cells = [measure(cell, form, size) for form in size.formats for cell in size.cells]
    over_none = [ratio for cell in cells for ratio in cell["over_none"].values()]
    over_before = [ratio for cell in cells for ratio in cell["over_before"].values()]
    means = {name: geometric_mean(ratios) for name, ratios in (("none", over_none), ("before", over_before))}
    value = {
        "mean_over_no_drafts": round(means["none"], 3),
        "mean_over_default_without_head": round(means["before"], 3),
        "worst_over_no_drafts": round(min(over_none), 3),
        "worst_over_default_without_head": round(min(over_before), 3),
    }
    ok = means["none"] >= 1.3 and means["before"] >= 1.1 and min(over_none) >= 0.97
    return Measurement(NAME, value, BAR, ok, {"cells": cells, "tokens": size.tokens})


def measure(cell: Cell, form: str, size: Size) -> dict[str, Any]:
    """One cell and format: the default's speed over both others for each task, and how the head's drafts went."""
    with_head, without = inflated(size.factor), inflated(size.factor, head=False)
    variants: dict[str, dict[str, Any]] = {
        "none": {"model": without, "speculate": "off"},
        "before": {"model": without},
        "head": {"model": with_head},
    }
    shared = cell.settings | {"experts": form}
    asked = questions(WARMING + size.questions, size.tasks)
    warming = WARMING * len({question.task for question in asked})
    found = alternate(
        None,
        {name: shared | own for name, own in variants.items()},
        asked[warming:],
        Sampling(temperature=0, max_tokens=size.tokens),
        warming=asked[:warming],
    )
    none, head = found["none"], found["head"]
    assert all(answers.token_ids == none.token_ids for answers in found.values()), "replies differ"
    at: dict[str, Any] = {
        "cell": f"{cell.name}, {form}",
        "ms_per_token": {name: 1e3 * answers.total / answers.tokens for name, answers in found.items()},
        "over_none": _ratios(none, head),
        "over_before": _ratios(found["before"], head),
        "before_over_none": _ratios(none, found["before"]),
        "tokens_per_cycle": 1 + head.grew("accepted") / max(1.0, head.grew("cycles")),
        "mb_per_token": {name: answers.grew("bytes_loaded") / 1e6 / answers.tokens for name, answers in found.items()},
    }
    worst = min(at["over_none"], key=lambda task: at["over_none"][task])
    print(
        f"{at['cell']:40} {geometric_mean(at['over_none'].values()):.2f}x no drafts "
        f"(worst {at['over_none'][worst]:.2f}x, {worst}), "
        f"{geometric_mean(at['over_before'].values()):.2f}x without a head, "
        f"{at['tokens_per_cycle']:.2f} tokens a cycle",
        flush=True,
    )
    return at


def _ratios(base: Answers, other: Answers) -> dict[str, float]:
    """How many times as fast `other` decoded the answers of each task."""
    return {task: seconds / other.seconds[task] for task, seconds in base.seconds.items()}
