"""Requests to measure with: held-out questions of all the shipped model's tasks, mixed."""

from __future__ import annotations

import random
from itertools import islice, zip_longest
from typing import Any

from edgemoe import Sampling
from edgemoe.demo.tasks import HELD_OUT_SEED, TASKS, Task
from edgemoe.results import Stats

Request = tuple[list[dict[str, str]], Sampling]
PATIENCE = 400
"""Items of a task that are looked at for a new one; some tasks have no more than two dozen."""


def mixed(count: int, max_tokens: int, seed: int = 0, *, ignore_eos: bool = False) -> list[Request]:
    """`count` different greedy chats over all documented tasks in random order; tasks with few items have few.

    With `ignore_eos` every reply has `max_tokens`: the model goes on with the next turns of a conversation.
    """
    draw = random.Random(seed)
    settings = Sampling(temperature=0, max_tokens=max_tokens, ignore_eos=ignore_eos)
    turns = zip_longest(*(distinct(task, count) for task in TASKS))
    questions = [question for turn in turns for question in turn if question is not None][:count]
    draw.shuffle(questions)
    return [([{"role": "user", "content": question}], settings) for question in questions]


def distinct(task: Task, count: int, *, held_out: bool = True) -> list[str]:
    """`count` different questions of `task`, or all there are where they are fewer."""
    items = islice(task.items(HELD_OUT_SEED, held_out=held_out), PATIENCE + 4 * count)
    return list(islice(dict.fromkeys(item.user for item in items), count))


def drafting_rates(before: Stats, after: Stats, seconds: float, gbps: float) -> dict[str, Any]:
    """What an engine did between two of its totals, `seconds` apart, behind a link of `gbps`."""
    counted = ("tokens_generated", "bytes_loaded", "cycles", "drafted", "accepted", "draft_seconds")
    generated, moved, cycles, drafted, accepted, drafting = (
        getattr(after, name) - getattr(before, name) for name in counted
    )
    return {
        "tokens_per_second": generated / seconds,
        "mb_per_token": moved / 1e6 / max(1, generated),
        "tokens_per_cycle": 1 + accepted / max(1, cycles),
        "acceptance": accepted / max(1, drafted),
        "link_share": moved / 1e9 / seconds / gbps,
        "draft_share": drafting / seconds,
        "seconds": seconds,
    }
