"""`never-slower`: the default speculation against none, for every task, cache, link and temperature."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from bench.measurement import BaseSize, Measurement
from bench.support.alternating import Question, answer, loaded, questions
from bench.support.checkpoints import FACTOR, SMALL_FACTOR, inflated
from bench.support.link_cells import Cell
from edgemoe import Engine, Sampling

NAME = "never-slower"
BAR = "--speculate auto >= 0.95x off in every task, cache, link and temperature, and >= 1.0x in the mean"
CELLS = (Cell("25%", None), Cell("25%", 4.0), Cell("50%", None), Cell("50%", 4.0), Cell("100%", None))
"""With every expert resident no link is used, so that one cell stands for both."""
TEMPERATURES = {"greedy": 0.0, "temperature 1": 1.0}
WARMING = 1
"""Questions of each task and temperature before those that count."""


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """Cells, how wide the experts are, and what is asked in each."""

    cells: tuple[Cell, ...] = CELLS
    factor: int = FACTOR
    tasks: tuple[str, ...] = ()
    """Of the shipped model; all of them where none is named."""
    questions: int = 8
    """Of each task and temperature, which are summed: short replies differ by a tenth from one to the next. Each is
    asked once, since an engine may draft from what it wrote."""
    tokens: int = 48


FULL, SMALL = (
    Size(),
    Size(small=True, cells=CELLS[1:2], factor=SMALL_FACTOR, tasks=("repeat", "count"), questions=1, tokens=6),
)


def run(size: Size = FULL) -> Measurement:
    """Decoding alone, warm, alternating."""
    cells = {cell.name: measure(cell, size) for cell in size.cells}
    ratios = {f"{cell}, {name}": ratio for cell, found in cells.items() for name, ratio in found.items()}
    worst = min(ratios, key=lambda name: ratios[name])
    mean = sum(ratios.values()) / len(ratios)
    value = {"worst": round(ratios[worst], 3), "where": worst, "mean": round(mean, 3)}
    return Measurement(NAME, value, BAR, ratios[worst] >= 0.95 and mean >= 1.0, {"cells": cells})


def measure(cell: Cell, size: Size) -> dict[str, float]:
    """How many times as fast the default is as no speculation, for each task and temperature of one cell."""
    asked = questions(len(TEMPERATURES) * (WARMING + size.questions), size.tasks)
    part = len(asked) // len(TEMPERATURES)
    with ExitStack() as stack:
        off, auto = (
            stack.enter_context(loaded(inflated(size.factor), **cell.settings, speculate=speculate))
            for speculate in ("off", "auto")
        )
        found = {
            f"{task}, {how}": ratio
            for turn, (how, temperature) in enumerate(TEMPERATURES.items())
            for task, ratio in _ratios(
                off, auto, asked[turn * part : (turn + 1) * part], temperature, size.tokens
            ).items()
        }
    worst = min(found, key=lambda name: found[name])
    mean = sum(found.values()) / len(found)
    print(f"{cell.name:32} worst {found[worst]:.2f}x ({worst}), mean {mean:.2f}x", flush=True)
    return found


def _ratios(off: Engine, auto: Engine, asked: Sequence[Question], temperature: float, tokens: int) -> dict[str, float]:
    """By task: how many times as fast `auto` decodes as `off`; they take turns, and who begins changes."""
    seconds: dict[Engine, Counter[str]] = {off: Counter(), auto: Counter()}
    tasks = len({question.task for question in asked})
    for place, question in enumerate(asked):
        sampling = Sampling(temperature=temperature, seed=place, max_tokens=tokens)
        order = (off, auto) if place % 2 else (auto, off)
        replies = {engine: answer(engine, question, sampling) for engine in order}
        # In bf16 a last bit may make another reply of it, on some machines: such times do not compare.
        same = len(replies[off].token_ids) == len(replies[auto].token_ids)
        if place >= tasks * WARMING and same:
            for engine, reply in replies.items():
                seconds[engine][question.task] += reply.timings.generate_seconds
    return {task: taken / max(seconds[auto][task], 1e-9) for task, taken in seconds[off].items()}
