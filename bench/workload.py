"""Requests to measure with: held-out questions of all the shipped model's tasks, mixed."""

from __future__ import annotations

import random
from itertools import islice

from edgemoe import Sampling
from edgemoe.demo.score import HELD_OUT_SEED
from edgemoe.demo.tasks import TASKS

Request = tuple[list[dict[str, str]], Sampling]


def mixed(count: int, max_tokens: int, seed: int = 0) -> list[Request]:
    """`count` greedy chats over all documented tasks in random order; tasks with few items repeat theirs."""
    draw = random.Random(seed)
    settings = Sampling(temperature=0, max_tokens=max_tokens)
    questions: list[str] = []
    for task in TASKS:
        own = [item.user for item in islice(task.items(HELD_OUT_SEED, held_out=True), count)]
        questions += [own[number % len(own)] for number in range(-(-count // len(TASKS)))]
    draw.shuffle(questions)
    return [([{"role": "user", "content": question}], settings) for question in questions[:count]]
