"""`never-slower`: the default speculation against none, for every task, cache, link and temperature."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

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
WORST = 0.95
WARMING = 1
"""Questions of each task and temperature before those that count."""


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """Cells, how wide the experts are, and what is asked in each."""

    cells: tuple[Cell, ...] = CELLS
    factor: int = FACTOR
    tasks: tuple[str, ...] = ()
    """Of the shipped model; all of them where none is named."""
    questions: int = 4
    """Of each task and temperature, which are summed: short replies differ by a tenth from one to the next. Each is
    asked once, since an engine may draft from what it wrote."""
    rounds: int = 4
    """How often a task below the bar is asked as many other questions, which are added to its sum: what a noisy
    machine did shrinks with the questions, what the engine does stays."""
    tokens: int = 48


FULL, SMALL = (
    Size(),
    Size(small=True, cells=CELLS[1:2], factor=SMALL_FACTOR, tasks=("repeat", "count"), questions=1, rounds=2, tokens=6),
)


def run(size: Size = FULL) -> Measurement:
    """Decoding alone, warm, alternating."""
    cells = {cell.name: measure(cell, size) for cell in size.cells}
    ratios = {f"{cell}, {name}": ratio for cell, found in cells.items() for name, ratio in found.items()}
    worst = min(ratios, key=lambda name: ratios[name])
    mean = sum(ratios.values()) / len(ratios)
    value = {"worst": round(ratios[worst], 3), "where": worst, "mean": round(mean, 3)}
    return Measurement(NAME, value, BAR, ratios[worst] >= WORST and mean >= 1.0, {"cells": cells})


def measure(cell: Cell, size: Size) -> dict[str, float]:
    """How many times as fast the default is as no speculation, for each task and temperature of one cell."""
    first = len(TEMPERATURES) * (WARMING + size.questions)
    turns = _by_turn(questions(first + len(TEMPERATURES) * (size.rounds - 1) * size.questions, size.tasks))
    found: dict[str, float] = {}
    with ExitStack() as stack:
        off, auto = (
            stack.enter_context(loaded(inflated(size.factor), **cell.settings, speculate=speculate))
            for speculate in ("off", "auto")
        )
        for place, (how, temperature) in enumerate(TEMPERATURES.items()):
            race = _Race(off, auto, Sampling(temperature=temperature, max_tokens=size.tokens))
            begin = place * (WARMING + size.questions)
            race.ask(turns[begin : begin + WARMING], counts=False)
            race.ask(turns[begin + WARMING : begin + WARMING + size.questions])
            # The temperatures take turns at what is left: some tasks have few questions.
            others = turns[first + place :: len(TEMPERATURES)]
            for again in range(size.rounds - 1):
                race.ask(others[again * size.questions :][: size.questions], only=race.below(WORST))
            found |= {f"{task}, {how}": ratio for task, ratio in race.ratios.items()}
    worst = min(found, key=lambda name: found[name])
    mean = sum(found.values()) / len(found)
    print(f"{cell.name:32} worst {found[worst]:.2f}x ({worst}), mean {mean:.2f}x", flush=True)
    return found


def _by_turn(asked: Sequence[Question]) -> list[list[Question]]:
    """The n-th question of every task that has so many, for each n."""
    seen: Counter[str] = Counter()
    turns: list[list[Question]] = []
    for question in asked:
        if seen[question.task] == len(turns):
            turns.append([])
        turns[seen[question.task]].append(question)
        seen[question.task] += 1
    return turns


class _Race:
    """Two engines that answer the same questions in turns; who begins changes."""

    def __init__(self, off: Engine, auto: Engine, sampling: Sampling) -> None:
        self._off, self._auto = off, auto
        self._sampling = sampling
        self._asked = 0
        self._seconds: dict[Engine, Counter[str]] = {off: Counter(), auto: Counter()}

    @property
    def ratios(self) -> dict[str, float]:
        """By task: how many times as fast `auto` decoded as `off`."""
        auto = self._seconds[self._auto]
        return {task: taken / max(auto[task], 1e-9) for task, taken in self._seconds[self._off].items()}

    def below(self, bar: float) -> set[str]:
        """The tasks whose ratio is less than `bar`."""
        return {task for task, ratio in self.ratios.items() if ratio < bar}

    def ask(self, turns: Sequence[Sequence[Question]], *, only: set[str] | None = None, counts: bool = True) -> None:
        """Both answer every question of the tasks `only`, or of all; the times are added up where it `counts`."""
        for question in (question for turn in turns for question in turn):
            if only is None or question.task in only:
                self._ask(question, counts)

    def _ask(self, question: Question, counts: bool) -> None:
        self._asked += 1
        sampling = replace(self._sampling, seed=self._asked)
        order = (self._off, self._auto) if self._asked % 2 else (self._auto, self._off)
        replies = {engine: answer(engine, question, sampling) for engine in order}
        # In bf16 a last bit may make another reply of it, on some machines: such times do not compare.
        if counts and len({len(reply.token_ids) for reply in replies.values()}) == 1:
            for engine, reply in replies.items():
                self._seconds[engine][question.task] += reply.timings.generate_seconds
