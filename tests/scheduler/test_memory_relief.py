"""A step that finds no memory begins again with more, a few times; then its requests end with an error."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from edgemoe.quiet import quiet_transformers
from edgemoe.scheduler.batch_size import BatchSize
from edgemoe.scheduler.memory_relief import MAX_HALVINGS, STEPS_UNTIL_PLANNED, MemoryRelief
from tests.support.checkpoints import Running, Zoo, random_ids, running
from tests.support.crowd import Crowd, alone, assert_same_reply, completion


@pytest.fixture
def own(zoo: Zoo) -> Iterator[Running]:
    with running(zoo("mixtral"), slots=12) as loaded, quiet_transformers():
        yield loaded


def test_bounds_are_halved_a_few_times_and_are_as_planned_after_many_good_steps() -> None:
    size = BatchSize(8, automatic=False)
    relief = MemoryRelief(size, 512)
    relief.went_well()
    for limit, tokens in ((4, 256), (2, 128), (1, 64)):
        assert relief.tighten()
        assert (size.limit, relief.step_tokens) == (limit, tokens)
    for _ in range(STEPS_UNTIL_PLANNED - 1):
        assert not relief.tighten()
        relief.went_well()
    relief.went_well()
    assert (size.limit, size.reason, relief.step_tokens) == (8, "as asked for", 512)
    assert relief.tighten()
    assert (size.limit, relief.step_tokens) == (4, 256)


def test_a_request_that_the_planned_steps_have_no_memory_for_is_done_at_last() -> None:
    """It begins again each time, and smaller steps last longer each time."""
    relief = MemoryRelief(BatchSize(8, automatic=False), 512)
    length, done, restarts = 60_000, 0, 0
    for _ in range(20_000):
        if done > 50_000 and relief.step_tokens > 64:
            assert relief.tighten()
            done, restarts = 0, restarts + 1
            continue
        done += relief.step_tokens
        relief.went_well()
        if done >= length:
            break
    assert done >= length
    assert restarts < 20
    for _ in range(20_000):
        relief.went_well()
    assert relief.tighten()
    for _ in range(STEPS_UNTIL_PLANNED):
        relief.went_well()
    assert relief.step_tokens == 512


def test_a_size_that_had_climbed_settles_below_what_found_no_memory() -> None:
    size = BatchSize(64, automatic=True)
    for _ in range(20):
        size.observe(size.limit, size.limit, 0.1)
    assert size.limit > 4
    size.hold(1)
    for _ in range(100):
        size.observe(1, 1, 0.1)
    assert size.limit == 1


def test_a_size_that_is_measured_does_not_climb_beyond_what_found_no_memory() -> None:
    size = BatchSize(64, automatic=True)
    size.hold(2)
    for _ in range(100):
        size.observe(2, 2, 0.1)
    assert size.limit == 2
    size.hold(None)
    assert size.limit == 4


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("of the device")])
def test_replies_are_the_same_after_a_step_without_memory(error: Exception, own: Running) -> None:
    crowd = Crowd(own, limit=4)
    prompts = [random_ids(12 + number, number) for number in range(4)]
    requests = [crowd.ask(prompt, max_tokens=6) for prompt in prompts]
    crowd.step()
    crowd.step()
    run, most = crowd.joint.run_sampled, list[int]()

    def fails_once(inputs: Any) -> Any:
        crowd.joint.run_sampled = counts  # type: ignore[method-assign]
        run(inputs[:2])
        raise error

    def counts(inputs: Any) -> Any:
        most.append(len(inputs))
        return run(inputs)

    crowd.joint.run_sampled = fails_once  # type: ignore[method-assign]
    crowd.finish()
    for request, prompt in zip(requests, prompts, strict=True):
        assert_same_reply(completion(request), alone(own, prompt, max_tokens=6))
    assert max(most) == 2
    assert crowd.scheduler.running == crowd.scheduler.waiting == 0


def test_reads_that_lack_memory_one_after_the_other_are_borne(own: Running) -> None:
    crowd = Crowd(own, limit=8)
    request = crowd.ask(random_ids(12, 3), max_tokens=4)
    run, failures = crowd.joint.run_sampled, [0]

    def fails(inputs: Any) -> Any:
        failures[0] += 1
        if failures[0] <= MAX_HALVINGS:
            raise MemoryError
        return run(inputs)

    crowd.joint.run_sampled = fails  # type: ignore[method-assign]
    crowd.finish()
    assert_same_reply(completion(request), alone(own, random_ids(12, 3), max_tokens=4))


def test_a_step_that_finds_none_again_fails_its_requests_and_the_next_ones_go_on(own: Running) -> None:
    crowd = Crowd(own, limit=4)
    requests = [crowd.ask(random_ids(12, seed), max_tokens=4) for seed in range(2)]
    run = crowd.joint.run_sampled

    def fails(inputs: Any) -> Any:
        raise MemoryError

    crowd.joint.run_sampled = fails  # type: ignore[method-assign]
    for _ in range(2 + MAX_HALVINGS):
        crowd.step()
    assert all(isinstance(request.error, MemoryError) for request in requests)
    crowd.joint.run_sampled = run  # type: ignore[method-assign]
    assert_same_reply(crowd.reply(random_ids(9, 5)), alone(own, random_ids(9, 5)))
