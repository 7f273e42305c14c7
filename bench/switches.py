"""`switches`: how soon the setting changes when a stream turns from copying to arithmetic, and back."""

from __future__ import annotations

from itertools import islice
from typing import Any

from bench.alternating import loaded, questions
from bench.checkpoints import inflated
from bench.measurement import Measurement
from edgemoe import Engine, Sampling

NAME = "switches"
BAR = "<= 60 cycles until the setting has changed"
HALVES = (("repeat", "replace"), ("arithmetic",))
TURNS = 3
"""Times that the stream turns each way."""
STEPS = 120
"""Of each half."""
SETTINGS = Sampling(temperature=0, max_tokens=64)


def run() -> Measurement:
    """The shipped model widened, all experts resident; what counts are cycles, not seconds."""
    counts: list[int] = []
    seen: list[dict[str, Any]] = []
    with loaded(inflated()) as engine:
        for turn in range(2 * TURNS + 1):
            before = engine.stats.speculation_setting
            settings = _half(engine, HALVES[turn % 2], turn)
            changed = next((place for place, setting in enumerate(settings) if setting != before), STEPS)
            if turn:
                counts.append(changed)
                seen.append({"to": HALVES[turn % 2], "from_setting": before, "cycles": changed})
                to = settings[changed] if changed < STEPS else before
                print(f"to {' and '.join(HALVES[turn % 2]):20} after {changed:3} cycles: {before} -> {to}", flush=True)
    value = {"worst": max(counts), "median": sorted(counts)[len(counts) // 2]}
    return Measurement(NAME, value, BAR, max(counts) <= 60, {"turns": seen})


def _half(engine: Engine, tasks: tuple[str, ...], turn: int) -> list[str]:
    """The setting after each of `STEPS` steps of a stream of `tasks`."""
    settings: list[str] = []
    asked = islice(questions(40, tasks), 8 * turn, None)
    while len(settings) < STEPS:
        prompt = engine.chat_prompt([{"role": "user", "content": next(asked).text}])
        before = engine.stats.steps
        for _ in engine.stream(prompt, SETTINGS):
            if engine.stats.steps > before:
                before = engine.stats.steps
                settings.append(engine.stats.speculation_setting)
    return settings[:STEPS]
