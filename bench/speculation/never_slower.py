"""`never-slower`: the default speculation against none, for every task, cache, link and temperature."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack

from bench.measurement import Measurement
from bench.support.alternating import Question, answer, loaded, questions
from bench.support.checkpoints import inflated
from bench.support.link_cells import Cell
from edgemoe import Engine, Sampling

NAME = "never-slower"
BAR = "--speculate auto >= 0.95x off in every task, cache, link and temperature"
CELLS = [Cell("25%", None), Cell("25%", 4.0), Cell("50%", None), Cell("50%", 4.0), Cell("100%", None)]
"""With every expert resident no link is used, so that one cell stands for both."""
TEMPERATURES = {"greedy": 0.0, "temperature 1": 1.0}
WARMING, QUESTIONS = 1, 8
"""Questions of each task and temperature before those that count, and these, which are summed: short replies differ by
a tenth from one to the next. Each is asked once, since an engine may draft from what it wrote."""
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
    asked = questions(len(TEMPERATURES) * (WARMING + QUESTIONS))
    part = len(asked) // len(TEMPERATURES)
    with ExitStack() as stack:
        off, auto = (
            stack.enter_context(loaded(inflated(), **cell.settings, speculate=speculate))
            for speculate in ("off", "auto")
        )
        found = {
            f"{task}, {how}": ratio
            for turn, (how, temperature) in enumerate(TEMPERATURES.items())
            for task, ratio in _ratios(off, auto, asked[turn * part : (turn + 1) * part], temperature).items()
        }
    worst = min(found, key=lambda name: found[name])
    mean = sum(found.values()) / len(found)
    print(f"{cell.name:32} worst {found[worst]:.2f}x ({worst}), mean {mean:.2f}x", flush=True)
    return found


def _ratios(off: Engine, auto: Engine, asked: Sequence[Question], temperature: float) -> dict[str, float]:
    """By task: how many times as fast `auto` decodes as `off`; they take turns, and who begins changes."""
    seconds: dict[Engine, Counter[str]] = {off: Counter(), auto: Counter()}
    tasks = len({question.task for question in asked})
    for place, question in enumerate(asked):
        sampling = Sampling(temperature=temperature, seed=place, max_tokens=TOKENS)
        order = (off, auto) if place % 2 else (auto, off)
        replies = {engine: answer(engine, question, sampling) for engine in order}
        # In bf16 a last bit may make another reply of it, on some machines: such times do not compare.
        same = len(replies[off].token_ids) == len(replies[auto].token_ids)
        if place >= tasks * WARMING and same:
            for engine, reply in replies.items():
                seconds[engine][question.task] += reply.timings.generate_seconds
    return {task: taken / max(seconds[auto][task], 1e-9) for task, taken in seconds[off].items()}
