"""The actor on a node, run without Ray."""

from __future__ import annotations

import pickle
import queue
import threading
import time
from collections.abc import Generator, Iterable, Iterator
from itertools import islice
from typing import Any

import pytest

from edgemoe import CheckpointError, Completion, EdgeMoEError, PlanError, RequestError, Sampling
from edgemoe.cluster.actor import NOT_BEGUN, EngineActor, NumberedReply, NumberedRequest
from tests.support.node_fakes import TOTALS, NodePlan

LONGEST = 10.0
"""Timeout in seconds, generous for a busy machine."""


class Scripted:
    """An engine that reads `ahead` requests, and answers with the items of `answers`."""

    plan, stats = NodePlan("scripted", 64), TOTALS
    has_tokenizer = has_chat_template = True

    def __init__(self) -> None:
        self.answers: queue.Queue[Any] = queue.Queue()
        self.cancels: list[bool] = []
        self.resumed = threading.Event()
        self.closed = 0
        self.ahead = 100

    def load(self, model: str | None, **settings: Any) -> Scripted:
        return self

    def generate_batch(
        self, requests: Iterable[tuple[Any, Sampling]]
    ) -> Generator[tuple[int, Completion | RequestError], None, None]:
        prompts = enumerate(requests)
        flying = [index for index, _ in islice(prompts, self.ahead)]
        try:
            while flying:
                answer = self.answers.get()
                if isinstance(answer, Exception) and not isinstance(answer, RequestError):
                    raise answer
                yield flying.pop(0), answer
                flying += [index for index, _ in islice(prompts, 1)]
                self.resumed.set()
        finally:
            self.closed += 1

    def cancel(self, *, running: bool = True) -> None:
        self.cancels.append(running)


@pytest.fixture
def engine() -> Scripted:
    return Scripted()


@pytest.fixture
def actor(engine: Scripted) -> Iterator[EngineActor]:
    actor = EngineActor()
    actor.load(engine, None, {})  # type: ignore[arg-type]
    yield actor
    for thread in [thread for thread in threading.enumerate() if thread.name == "edgemoe-shard"]:
        thread.join(LONGEST)


def requests(*numbers: int) -> list[NumberedRequest]:
    return [NumberedRequest(number, f"prompt {number}", Sampling()) for number in numbers]


def fetch(actor: EngineActor, count: int, box: int = 1) -> list[NumberedReply]:
    """At least `count` replies."""
    found: list[NumberedReply] = []
    deadline = time.monotonic() + LONGEST
    while len(found) < count:
        assert time.monotonic() < deadline
        found += actor.exchange(box, [], None, 0.1).replies
    return found


def reply(text: str) -> Completion:
    return Completion(text, (1,), "stop", None, NOT_BEGUN.timings, (2,))


def wait_until_closed(engine: Scripted, count: int) -> None:
    deadline = time.monotonic() + LONGEST
    while engine.closed < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_replies_have_the_numbers_of_their_requests(actor: EngineActor, engine: Scripted) -> None:
    refused = RequestError("no")
    for answer in (reply("a"), refused, reply("b")):
        engine.answers.put(answer)
    exchanged = actor.exchange(1, requests(7, 3, 12), None, LONGEST)
    found = exchanged.replies + fetch(actor, 3 - len(exchanged.replies))
    assert found == [(7, reply("a")), (3, refused), (12, reply("b"))]
    assert exchanged.stats == TOTALS


def test_an_exchange_waits_no_longer_than_it_may(actor: EngineActor, engine: Scripted) -> None:
    assert actor.exchange(1, requests(1), None, 0.05).replies == []
    engine.answers.put(reply("late"))
    assert fetch(actor, 1) == [(1, reply("late"))]


def test_shards_run_side_by_side_and_batches_are_kept_apart(actor: EngineActor, engine: Scripted) -> None:
    for box in (1, 2):
        for number in (10 * box, 10 * box + 1):
            actor.exchange(box, requests(number), None, 0.0)
    for _ in range(4):
        engine.answers.put(reply("x"))
    assert sorted(number for number, _ in fetch(actor, 2, box=1)) == [10, 11]
    assert sorted(number for number, _ in fetch(actor, 2, box=2)) == [20, 21]


@pytest.mark.parametrize("running", [False, True])
def test_a_cancel_ends_what_the_engine_has_not_read(actor: EngineActor, engine: Scripted, running: bool) -> None:
    engine.ahead = 2
    actor.exchange(1, requests(1, 2, 3, 4), None, 0.0)
    engine.answers.put(reply("first"))
    fetch(actor, 1)
    assert engine.resumed.wait(LONGEST)
    assert actor.exchange(1, [], running, 0.0).replies == []
    assert engine.cancels == [running]
    for _ in range(2):
        engine.answers.put(reply("begun"))
    found = fetch(actor, 3)
    assert [outcome for _, outcome in found] == [reply("begun"), reply("begun"), NOT_BEGUN]
    assert sorted(number for number, _ in found) == [2, 3, 4]


def test_what_comes_with_a_cancel_or_after_it_runs(actor: EngineActor, engine: Scripted) -> None:
    actor.exchange(1, requests(1), False, 0.0)
    engine.answers.put(reply("x"))
    assert fetch(actor, 1) == [(1, reply("x"))]


def test_an_error_of_the_engine_comes_after_what_had_finished(actor: EngineActor, engine: Scripted) -> None:
    engine.answers.put(reply("good"))
    engine.answers.put(ZeroDivisionError("a fault"))
    actor.exchange(1, [], None, 0.0)
    found = actor.exchange(1, requests(1, 2), None, LONGEST).replies or fetch(actor, 1)
    assert found == [(1, reply("good"))]
    with pytest.raises(ZeroDivisionError):
        fetch(actor, 1)


def test_a_batch_that_ends_is_cancelled_at_once_when_it_is_alone(actor: EngineActor, engine: Scripted) -> None:
    actor.exchange(1, requests(1, 2), None, 0.0)
    actor.end(1)
    assert engine.cancels == [True]
    engine.answers.put(reply("nobody waits"))
    wait_until_closed(engine, 1)
    assert actor.exchange(1, requests(3), None, LONGEST).replies == []


def test_a_batch_that_ends_beside_another_leaves_that_alone(actor: EngineActor, engine: Scripted) -> None:
    actor.exchange(1, requests(1, 2), None, 0.0)
    actor.exchange(2, requests(5), None, 0.0)
    actor.end(1)
    assert engine.cancels == []
    for _ in range(2):
        engine.answers.put(reply("x"))
    assert fetch(actor, 1, box=2) == [(5, reply("x"))]
    wait_until_closed(engine, 2)


def test_ending_a_batch_that_never_came_does_nothing(actor: EngineActor, engine: Scripted) -> None:
    actor.end(9)
    assert engine.cancels == []


def test_an_actor_without_an_engine_says_so() -> None:
    with pytest.raises(EdgeMoEError, match="not been loaded"):
        EngineActor().exchange(1, [], None, 0.0)


@pytest.mark.parametrize("kind", [EdgeMoEError, CheckpointError, PlanError, RequestError])
def test_errors_and_completions_travel(kind: type[EdgeMoEError]) -> None:
    travelled = pickle.loads(pickle.dumps(kind("one sentence")))
    assert type(travelled) is kind
    assert str(travelled) == "one sentence"
    assert pickle.loads(pickle.dumps(reply("x"))) == reply("x")
