"""`demo-score`: the shipped model on held-out items of its documented tasks."""

from __future__ import annotations

from dataclasses import dataclass

from bench.measurement import BaseSize, Measurement
from edgemoe import Engine
from edgemoe.measure.task_score import score

NAME = "demo-score"
BAR = ">= 90 % on each documented task"


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """Held-out questions of each task."""

    questions: int = 50


FULL, SMALL = Size(), Size(small=True, questions=1)


def run(size: Size = FULL) -> Measurement:
    """Asks every task's questions greedily, one conversation each."""
    with Engine.load(device="cpu") as engine:
        scores = score(engine, size.questions)
    for item in scores:
        print(f"{item.task.name:12} {item.task.nature:12} {item.right:4} of {item.asked}", flush=True)
    value = {item.task.name: round(item.share, 3) for item in scores}
    wrong = {item.task.name: item.wrong for item in scores if item.wrong}
    return Measurement(NAME, value, BAR, min(value.values()) >= 0.9, {"examples_of_wrong_replies": wrong})
