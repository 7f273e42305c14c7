"""How well a model does the documented tasks: the measure by which lossy settings are judged too."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from edgemoe.demo.tasks import HELD_OUT_SEED, TASKS, Task
from edgemoe.sampling import Sampling

if TYPE_CHECKING:
    from edgemoe.engine import Engine

LONGEST_REPLY = 256
"""Tokens; the longest right reply of any task is shorter."""


@dataclass(frozen=True)
class TaskScore:
    """Right replies of one task, out of `asked` held-out questions, and a few wrong ones as (asked, replied)."""

    task: Task
    right: int
    asked: int
    wrong: tuple[tuple[str, str], ...]

    @property
    def share(self) -> float:
        """Right replies over questions, from 0 to 1."""
        return self.right / self.asked


def score_task(engine: Engine, task: Task, questions: int) -> TaskScore:
    """Asks `questions` distinct held-out questions of `task`, each a conversation of its own, greedily."""
    settings = Sampling(temperature=0, max_tokens=LONGEST_REPLY)
    wrong = []
    items = {item.user: item for item in islice(task.items(HELD_OUT_SEED, held_out=True), 8 * questions)}
    asked = list(items.values())[:questions]
    for item in asked:
        reply = engine.generate(engine.chat_prompt([{"role": "user", "content": item.user}]), settings).text
        if not task.accepts(item, reply):
            wrong.append((item.user, reply))
    return TaskScore(task, len(asked) - len(wrong), len(asked), tuple(wrong[:3]))


def score(engine: Engine, questions: int = 50) -> list[TaskScore]:
    """The scores of all documented tasks, in the documentation's order."""
    return [score_task(engine, task, questions) for task in TASKS]
