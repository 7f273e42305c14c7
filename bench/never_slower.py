"""`never-slower`: the default speculation against none, for every task, cache, link and temperature."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import ExitStack

from bench.alternating import Question, answer, loaded, questions
from bench.checkpoints import inflated
from bench.link_cells import Cell
from bench.measurement import Measurement
from edgemoe import Engine, Sampling

NAME = "never-slower"
BAR = "--speculate auto >= 0.95x off in every task, cache, link and temperature"
CELLS = [Cell("25%", None), Cell("25%", 4.0), Cell("50%", None), Cell("50%", 4.0), Cell("100%", None)]
"""With every expert resident no link is used, so that one cell stands for both."""
TEMPERATURES = {"greedy": 0.0, "temperature 1": 1.0}
QUESTIONS = 4
"""Of each task and temperature, each asked once: what an engine wrote it may draft from. The median of their ratios
counts: on a machine where other programs run a single one says little."""
WARMING = 1
"""Of each task before these."""
TOKENS = 48


def run() -> Measurement:
    """Decoding alone, warm, alternating."""
    cells = {cell.name: measure(cell) for cell in CELLS}
    ratios = {f"{cell}, {name}": ratio for cell, found in cells.items() for name, ratio in found.items()}
    worst = min(ratios, key=lambda name: ratios[name])
    mean = sum(ratios.values()) / len(ratios)
    value = {"worst": round(ratios[worst], 3), "where": worst, "mean": round(mean, 3)}
    return Measurement(NAME, value, BAR, ratios[worst] >= 0.95, {"cells": cells})


def measure(cell: Cell) -> dict[str, float]:
    """How many times as fast the default is as no speculation, for each task and temperature of one cell."""
    asked = questions(WARMING + QUESTIONS)
    with ExitStack() as stack:
        off, auto = (
            stack.enter_context(loaded(inflated(), **cell.settings, speculate=speculate))
            for speculate in ("off", "auto")
        )
        found = {
            f"{task}, {how}": ratio
            for how, temperature in TEMPERATURES.items()
            for task, ratio in _ratios(off, auto, asked, temperature).items()
        }
    worst = min(found, key=lambda name: found[name])
    mean = sum(found.values()) / len(found)
    print(f"{cell.name:32} worst {found[worst]:.2f}x ({worst}), mean {mean:.2f}x", flush=True)
    return found


def _ratios(off: Engine, auto: Engine, asked: Sequence[Question], temperature: float) -> dict[str, float]:
    """By task: how many times as fast `auto` decodes as `off`; they take turns, and who begins changes."""
    ratios: dict[str, list[float]] = {}
    warming = len(asked) * WARMING // (WARMING + QUESTIONS)
    for place, question in enumerate(asked):
        sampling = Sampling(temperature=temperature, seed=place, max_tokens=TOKENS)
        first, second = (off, auto) if place % 2 else (auto, off)
        timings = {engine: answer(engine, question, sampling).timings for engine in (first, second)}
        taken = {engine: each.generate_seconds for engine, each in timings.items()}
        # A reply of one token is over with its prompt.
        if place >= warming and timings[off].generated_tokens > 1:
            ratios.setdefault(question.task, []).append(taken[off] / max(taken[auto], 1e-9))
    return {task: statistics.median(each) for task, each in ratios.items()}
