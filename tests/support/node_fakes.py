"""An engine without a model for the nodes of a test's cluster, whose processes import it by this module's name."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from edgemoe.cluster.actor import NOT_BEGUN
from edgemoe.errors import CheckpointError, PlanError, RequestError
from edgemoe.results import Completion, Progress, Stats
from edgemoe.sampling import Sampling

_ZEROS: dict[str, Any] = {field.name: 0 for field in fields(Stats)}
_WORDS = {"batch": 4, "batch_reason": "as asked for", "speculation": "off: asked for"}
TOTALS = Stats(**_ZEROS | _WORDS)


@dataclass(frozen=True)
class NodePlan:
    """As much of a plan as is looked at."""

    model: str
    context: int


class NodeEngine:
    """Answers one request after the other, in `context` milliseconds each, with its process's id and the prompt.

    Some prompts are orders: "bad" is refused, "die" ends the process, "fail" and "unreadable" raise,
    "long" lasts until it is cancelled.
    """

    has_tokenizer = True
    has_chat_template = False

    def __init__(self, plan: NodePlan) -> None:
        self.plan = plan
        self._cancelled = threading.Event()
        self._answered = 0

    @classmethod
    def load(
        cls, model: str | None, *, on_progress: Callable[[Progress], None], context: int, **settings: Any
    ) -> NodeEngine:
        on_progress(Progress("weights", 30, 100))
        if model == "missing":
            raise CheckpointError("missing is no folder: give another with -m")
        if model == "large":
            raise PlanError("large does not fit: lower --ctx-size")
        if model == "deadly":
            os._exit(1)
        time.sleep(0.3)
        return cls(NodePlan(str(model), context))

    @staticmethod
    def plan_for(model: str, **settings: Any) -> NodePlan:
        """The context is 7 for the first process that asks and 5 for the others: `model` is a folder for notes."""
        Path(model, str(os.getpid())).touch()
        return NodePlan(model, 7 if len(list(Path(model).iterdir())) == 1 else 5)

    @property
    def stats(self) -> Stats:
        return Stats(**vars(TOTALS) | {"requests": self._answered})

    def generate_batch(
        self, requests: Iterable[tuple[Any, Sampling]]
    ) -> Generator[tuple[int, Completion | RequestError], None, None]:
        for index, (prompt, _) in enumerate(requests):
            if prompt == "bad":
                yield index, RequestError("bad is no prompt")
                continue
            reason = self._work(prompt)
            self._answered += 1
            yield index, Completion(f"{os.getpid()} {prompt}", (1,), reason, None, NOT_BEGUN.timings, (index,))

    def cancel(self, *, running: bool = True) -> None:
        if running:
            self._cancelled.set()

    def _work(self, prompt: Any) -> str:
        self._cancelled.clear()
        if prompt == "die":
            os._exit(1)
        if prompt == "fail":
            raise ZeroDivisionError("the engine has a fault")
        if prompt == "unreadable":
            raise CheckpointError("it cannot be read any more: fetch it again")
        milliseconds = 60_000 if prompt == "long" else self.plan.context
        return "cancelled" if self._cancelled.wait(milliseconds / 1000) else "stop"
