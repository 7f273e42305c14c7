"""Engines with different settings that answer the same questions in turns, so that a noisy machine is fair to all."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from bench.support.workload import distinct
from edgemoe import Engine, Sampling
from edgemoe.checkpoint.blueprint import blueprint_for
from edgemoe.config import EngineConfig
from edgemoe.demo.tasks import TASKS
from edgemoe.results import Stats


class Question(NamedTuple):
    """A held-out question of one of the shipped model's tasks."""

    task: str
    text: str


@dataclass
class Answers:
    """What one engine did: seconds of decoding and steps by task, tokens, and its totals before and after."""

    seconds: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    token_ids: list[tuple[int, ...]] = field(default_factory=list)
    speeds: list[float] = field(default_factory=list)
    """Tokens a second of each answer's decoding, as questions were asked."""
    before: Stats | None = None
    after: Stats | None = None

    @property
    def total(self) -> float:
        """Seconds of decoding, prompts left out."""
        return sum(self.seconds.values())

    def grew(self, name: str) -> float:
        """How much a total grew meanwhile."""
        return float(getattr(self.after, name) - getattr(self.before, name))


def questions(each: int, tasks: Sequence[str] = ()) -> list[Question]:
    """`each` different held-out questions of every documented task, or of `tasks`, task by task in turns."""
    chosen = [task for task in TASKS if not tasks or task.name in tasks]
    own = {task.name: distinct(task, each) for task in chosen}
    return [Question(name, texts[turn]) for turn in range(each) for name, texts in own.items() if turn < len(texts)]


@contextmanager
def loaded(model: Path | None, **settings: Any) -> Iterator[Engine]:
    """An engine with any setting of `EngineConfig`; it keeps no heat, so that runs compare."""
    options: dict[str, Any] = {"device": "cpu", "context": 512, "state_folder": "none"}
    config = EngineConfig(**options | settings)
    engine = Engine(blueprint_for(model, config), config, lambda progress: None)
    try:
        yield engine
    finally:
        engine.close()


def alternate(
    model: Path | None,
    variants: Mapping[str, Mapping[str, Any]],
    asked: Sequence[Question],
    sampling: Sampling,
    *,
    warming: Sequence[Question] = (),
) -> dict[str, Answers]:
    """Every variant answers every question once; who begins changes from one to the next. Warm: two came before.

    A variant may name a `model` of its own. The questions of `warming` are asked before, and do not count.
    """
    with ExitStack() as stack:
        options = {name: {"model": model, **settings} for name, settings in variants.items()}
        engines = {name: stack.enter_context(loaded(**own)) for name, own in options.items()}
        found = {name: Answers() for name in variants}
        for name, engine in engines.items():
            warm_up(engine, sampling)
            for question in warming:
                answer(engine, question, sampling)
            found[name].before = engine.stats
        names = list(engines)
        for turn, question in enumerate(asked):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                _answer(engines[name], question, sampling, found[name])
        for name, engine in engines.items():
            found[name].after = engine.stats
    return found


def warm_up(engine: Engine, sampling: Sampling) -> None:
    """Two answers to what no measurement asks: what an engine has written it may draft from."""
    for task in TASKS[:2]:
        answer(engine, Question(task.name, distinct(task, 1, held_out=False)[0]), sampling)


def answer(engine: Engine, question: Question, sampling: Sampling) -> Any:
    """The reply to one question."""
    return engine.generate(engine.chat_prompt([{"role": "user", "content": question.text}]), sampling)


def _answer(engine: Engine, question: Question, sampling: Sampling, into: Answers) -> None:
    started = time.perf_counter()
    completion = answer(engine, question, sampling)
    assert time.perf_counter() - started >= completion.timings.generate_seconds
    into.seconds[question.task] = into.seconds.get(question.task, 0.0) + completion.timings.generate_seconds
    decoded = completion.timings.generated_tokens - 1
    into.tokens += decoded
    into.speeds.append(decoded / max(completion.timings.generate_seconds, 1e-9))
    into.token_ids.append(completion.token_ids)
