"""`never-slower`: the default speculation against none, for every task, cache, link and temperature."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

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
QUESTIONS = 2
"""Of each task and temperature."""
ROUNDS = 3
"""Of which each question's median counts: on a machine where other programs run a single ratio says little."""
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
    asked, found = questions(QUESTIONS), {}
    with ExitStack() as stack:
        engines = [
            stack.enter_context(loaded(inflated(), **cell.settings, speculate=speculate))
            for speculate in ("off", "auto")
        ]
        for how, temperature in TEMPERATURES.items():
            settings = [
                Sampling(temperature=temperature, seed=number, max_tokens=TOKENS) for number in range(len(asked))
            ]
            seconds = _seconds(engines, asked, settings)
            for task in dict.fromkeys(question.task for question in asked):
                places = [place for place, question in enumerate(asked) if question.task == task]
                off, auto = (sum(own[place] for place in places) for own in seconds)
                found[f"{task}, {how}"] = off / max(auto, 1e-9)
    worst = min(found, key=lambda name: found[name])
    mean = sum(found.values()) / len(found)
    print(f"{cell.name:32} worst {found[worst]:.2f}x ({worst}), mean {mean:.2f}x", flush=True)
    return found


def _seconds(engines: Sequence[Engine], asked: Sequence[Question], settings: Sequence[Sampling]) -> list[list[float]]:
    """Each engine's median seconds of decoding for each question; they take turns, and who begins changes."""
    taken: list[list[list[float]]] = [[[] for _ in asked] for _ in engines]
    for round_ in range(ROUNDS + 1):
        for place, (question, sampling) in enumerate(zip(asked, settings, strict=True)):
            for turn in range(len(engines)):
                number = (turn + place + round_) % len(engines)
                timings: Any = answer(engines[number], question, sampling).timings
                # The first round warms up.
                if round_:
                    taken[number][place].append(timings.generate_seconds)
    return [[sorted(each)[len(each) // 2] for each in own] for own in taken]
