"""`switches`: how soon what is drafted changes when a stream turns from copying to arithmetic, and back."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from statistics import mean, median
from typing import Any, NamedTuple

from bench.measurement import BaseSize, Measurement
from bench.support.alternating import loaded, questions
from bench.support.checkpoints import FACTOR, SMALL_FACTOR, inflated
from edgemoe import Engine, Sampling

NAME = "switches"
BAR = "<= 60 cycles until what is drafted has changed, and the setting that is told"
HALVES = (("repeat", "replace"), ("arithmetic",))
WINDOW = 8
"""Steps over which drafted tokens are averaged; they have changed when that crosses the middle of the levels."""
SETTINGS = Sampling(temperature=0, max_tokens=64)


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """How wide the experts are, and how long the stream is."""

    factor: int = FACTOR
    turns: int = 3
    """Times that the stream turns each way."""
    steps: int = 120
    """Of each half, of which the second half is what it settles at."""


FULL, SMALL = Size(), Size(small=True, factor=SMALL_FACTOR, turns=1, steps=12)


class Step(NamedTuple):
    """A step of a stream: the setting after it, and the tokens that were drafted in it."""

    setting: str
    drafted: int


def run(size: Size = FULL) -> Measurement:
    """The shipped model widened, all experts resident; what counts are cycles, not seconds."""
    with loaded(inflated(size.factor)) as engine:
        halves = [_half(engine, HALVES[turn % 2], turn, size.steps) for turn in range(2 * size.turns + 1)]
    turns: list[dict[str, Any]] = []
    for turn, (before, after) in enumerate(zip(halves, halves[1:], strict=False), 1):
        levels = [mean(step.drafted for step in half[size.steps // 2 :]) for half in (before, after)]
        middle = sum(levels) / 2
        drafted = [step.drafted for step in (*before[-WINDOW:], *after)]
        averages = [mean(drafted[place : place + WINDOW]) for place in range(1, len(after) + 1)]
        crossed = (place for place, level in enumerate(averages, 1) if (level > middle) == (levels[1] > levels[0]))
        cycles = next(crossed, size.steps)
        setting = next((place for place, step in enumerate(after, 1) if step.setting != before[-1].setting), size.steps)
        to = " and ".join(HALVES[turn % 2])
        turns.append({"to": to, "drafts": cycles, "setting": setting, "drafted_per_step": levels})
        drafts = f"{levels[0]:.2f} -> {levels[1]:.2f} drafted a step after {cycles} cycles"
        print(f"to {to:20} {drafts}, another setting after {setting}", flush=True)
    value: dict[str, float] = {}
    for what in ("drafts", "setting"):
        counts = [at[what] for at in turns]
        value |= {f"{what}_worst": max(counts), f"{what}_median": median(counts)}
    ok = max(value["drafts_worst"], value["setting_worst"]) <= 60
    return Measurement(NAME, value, BAR, ok, {"turns": turns})


def _half(engine: Engine, tasks: tuple[str, ...], turn: int, count: int) -> list[Step]:
    """`count` steps of a stream of `tasks`."""
    steps: list[Step] = []
    asked = islice(questions(100, tasks), 12 * turn, None)
    while len(steps) < count:
        prompt = engine.chat_prompt([{"role": "user", "content": next(asked).text}])
        before = engine.stats
        for _ in engine.stream(prompt, SETTINGS):
            now = engine.stats
            if now.steps > before.steps:
                steps.append(Step(now.speculation_setting, now.drafted - before.drafted))
                before = now
    return steps[:count]
