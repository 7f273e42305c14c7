"""`adapts`: the default speculation on a mixed workload against the best fixed setting, chosen with hindsight."""

from __future__ import annotations

from typing import Any

from bench.measurement import Measurement
from bench.support.alternating import alternate, questions
from bench.support.checkpoints import inflated
from bench.support.link_cells import Cell
from edgemoe import Sampling

NAME = "adapts"
BAR = "auto >= 1.07x the best fixed setting for the whole workload"
CELLS = [Cell("100%", None), Cell("50%", None)]
FIXED: dict[str, dict[str, Any]] = {
    "off": {"speculate": "off"},
    "2": {"speculate": "ngram", "draft_nodes": 2, "draft_shape": "chain"},
    "4": {"speculate": "ngram", "draft_nodes": 4, "draft_shape": "chain"},
    "8": {"speculate": "ngram", "draft_nodes": 8, "draft_shape": "chain"},
    "tree of 16": {"speculate": "ngram", "draft_nodes": 16},
}
"""Drafters that are named always draft: as Cascade's static K."""
QUESTIONS = 3
SETTINGS = Sampling(temperature=0, max_tokens=64)


def run() -> Measurement:
    """All tasks in turns. Decoding alone, warm, alternating."""
    cells = {}
    for cell in CELLS:
        variants = {name: cell.settings | own for name, own in (FIXED | {"auto": {}}).items()}
        found = alternate(inflated(), variants, questions(QUESTIONS), SETTINGS)
        speeds = {name: answers.tokens / answers.total for name, answers in found.items()}
        best = max(FIXED, key=lambda name: speeds[name])
        cells[cell.name] = {"speeds": speeds, "best": best, "auto_over_best": speeds["auto"] / speeds[best]}
        shown = ", ".join(f"{name} {speed:.1f}" for name, speed in speeds.items())
        print(f"{cell.name:32} tokens/s: {shown}; auto {speeds['auto'] / speeds[best]:.2f}x {best}", flush=True)
    value = {name: round(at["auto_over_best"], 3) for name, at in cells.items()}
    return Measurement(NAME, value, BAR, min(value.values()) >= 1.07, {"cells": cells})
