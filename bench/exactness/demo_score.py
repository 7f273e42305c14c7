"""`demo-score`: the shipped model, and its draft head, on held-out items of its documented tasks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bench.measurement import BaseSize, Measurement
from bench.support.workload import distinct
from edgemoe import Engine, Sampling
from edgemoe.demo.tasks import TASKS
from edgemoe.measure.task_score import score

NAME = "demo-score"
BAR = ">= 90 % on each documented task"
DEPTH = 3
"""Tokens that the head drafts at once here, one after the other."""


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """Held-out questions of each task."""

    questions: int = 50


FULL, SMALL = Size(), Size(small=True, questions=1)


def run(size: Size = FULL) -> Measurement:
    """Asks every task's questions greedily, one conversation each."""
    drafts: dict[str, Any] = {"speculate": "mtp", "draft_depth": DEPTH, "draft_shape": "chain"}
    with Engine.load(device="cpu", state_folder="none", **drafts) as engine:
        heads = {task.name: _drafts(engine, distinct(task, size.questions)) for task in TASKS}
        scores = score(engine, size.questions)
    for item in scores:
        accepted, tokens = heads[item.task.name]
        print(
            f"{item.task.name:12} {item.task.nature:12} {item.right:4} of {item.asked}, "
            f"{accepted:.0%} of the drafted tokens accepted, {tokens:.2f} tokens a cycle",
            flush=True,
        )
    value = {item.task.name: round(item.share, 3) for item in scores}
    wrong = {item.task.name: item.wrong for item in scores if item.wrong}
    detail = {
        "examples_of_wrong_replies": wrong,
        "accepted_of_drafted": {name: accepted for name, (accepted, _) in heads.items()},
        "tokens_per_cycle": {name: tokens for name, (_, tokens) in heads.items()},
    }
    return Measurement(NAME, value, BAR, min(value.values()) >= 0.9, detail)


def _drafts(engine: Engine, questions: list[str]) -> tuple[float, float]:
    """The share of the head's drafts that are in greedy replies to `questions`, and the tokens of a cycle."""
    before, greedy = engine.stats, Sampling(temperature=0, max_tokens=256)
    for question in questions:
        engine.generate(engine.chat_prompt([{"role": "user", "content": question}]), greedy)
    after = engine.stats
    cycles, drafted, accepted = (
        getattr(after, name) - getattr(before, name) for name in ("cycles", "drafted", "accepted")
    )
    return accepted / max(1, drafted), (accepted + cycles) / max(1, cycles)
