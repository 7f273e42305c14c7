"""The score of a model on the shipped model's tasks."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from edgemoe.demo.tasks import HELD_OUT_SEED, TASKS, Task
from edgemoe.sampling import Sampling

if TYPE_CHECKING:
    from edgemoe.engine import Engine

MAX_REPLY_TOKENS = 256
"""More than the longest right reply of any task."""


@dataclass(frozen=True)
class TaskScore:
    """Right replies to `asked` held-out questions of one task, and up to three wrong ones as (question, reply)."""

    task: Task
    right: int
    asked: int
    wrong: tuple[tuple[str, str], ...]

    @property
    def share(self) -> float:
        """Share of right replies, from 0 to 1."""
        return self.right / self.asked


def score_task(engine: Engine, task: Task, questions: int) -> TaskScore:
    """Asks up to `questions` distinct held-out questions of `task`, each in a conversation of its own, greedily."""
    settings = Sampling(temperature=0, max_tokens=MAX_REPLY_TOKENS)
    wrong = []
    items = {item.user: item for item in islice(task.items(HELD_OUT_SEED, held_out=True), 8 * questions)}
    asked = list(items.values())[:questions]
    for item in asked:
        reply = engine.generate(engine.chat_prompt([{"role": "user", "content": item.user}]), settings).text
        if not task.accepts(item, reply):
            wrong.append((item.user, reply))
    return TaskScore(task, len(asked) - len(wrong), len(asked), tuple(wrong[:3]))


def score(engine: Engine, questions: int = 50) -> list[TaskScore]:
    """The scores of all tasks, in the order of `TASKS`."""
    return [score_task(engine, task, questions) for task in TASKS]
