"""`adapts`: the default speculation on a mixed workload against the best fixed setting, chosen with hindsight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bench.measurement import BaseSize, Measurement
from bench.support.alternating import alternate, questions
from bench.support.checkpoints import FACTOR, SMALL_FACTOR, inflated
from bench.support.link_cells import Cell
from edgemoe import Sampling

NAME = "adapts"
BAR = "auto >= 1.07x the best fixed setting for the whole workload"
CELLS = (Cell("100%", None), Cell("50%", None))
FIXED: dict[str, dict[str, Any]] = {
    "off": {"speculate": "off"},
    "2": {"speculate": "ngram", "draft_nodes": 2, "draft_shape": "chain"},
    "4": {"speculate": "ngram", "draft_nodes": 4, "draft_shape": "chain"},
    "8": {"speculate": "ngram", "draft_nodes": 8, "draft_shape": "chain"},
    "tree of 16": {"speculate": "ngram", "draft_nodes": 16},
}
"""Drafters that are named always draft: as Cascade's static K."""


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """Cells, how wide the experts are, and what is asked in each."""

    cells: tuple[Cell, ...] = CELLS
    factor: int = FACTOR
    tasks: tuple[str, ...] = ()
    """Of the shipped model; all of them where none is named."""
    questions: int = 3
    tokens: int = 64


FULL, SMALL = (
    Size(),
    Size(small=True, cells=CELLS[1:], factor=SMALL_FACTOR, tasks=("repeat", "count"), questions=1, tokens=6),
)


def run(size: Size = FULL) -> Measurement:
    """All tasks in turns. Decoding alone, warm, alternating."""
    cells: dict[str, dict[str, Any]] = {}
    sampling = Sampling(temperature=0, max_tokens=size.tokens)
    for cell in size.cells:
        variants = {name: cell.settings | own for name, own in (FIXED | {"auto": {}}).items()}
        found = alternate(inflated(size.factor), variants, questions(size.questions, size.tasks), sampling)
        speeds = {name: answers.tokens / answers.total for name, answers in found.items()}
        best = max(FIXED, key=lambda name: speeds[name])
        cells[cell.name] = {"speeds": speeds, "best": best, "auto_over_best": speeds["auto"] / speeds[best]}
        shown = ", ".join(f"{name} {speed:.1f}" for name, speed in speeds.items())
        print(f"{cell.name:32} tokens/s: {shown}; auto {speeds['auto'] / speeds[best]:.2f}x {best}", flush=True)
    value = {name: round(at["auto_over_best"], 3) for name, at in cells.items()}
    return Measurement(NAME, value, BAR, min(value.values()) >= 1.07, {"cells": cells})
