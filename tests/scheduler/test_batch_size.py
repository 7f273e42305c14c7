"""The measured batch size: it climbs while that pays, settles on the better one, and looks again later."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from edgemoe.scheduler.batch_size import GAIN, START, STEPS, STEPS_BETWEEN_TRIALS, BatchSize


def run(size: BatchSize, rate: Callable[[int], float], steps: int, waiting: int = 10**6) -> list[int]:
    """Full steps of one token a sequence at `rate(sequences)` tokens a second; the limits that followed one another."""
    limits = [size.limit]
    for _ in range(steps):
        running = min(size.limit, waiting)
        size.observe(running, running, running / rate(running))
        if size.limit != limits[-1]:
            limits.append(size.limit)
    return limits


def until_settled(size: BatchSize, rate: Callable[[int], float]) -> list[int]:
    return run(size, rate, 20 * STEPS)


def test_it_doubles_while_more_make_more_tokens() -> None:
    size = BatchSize(64, automatic=True)
    assert until_settled(size, lambda batch: 100.0 * batch) == [4, 8, 16, 32, 64]
    assert size.reason == "64 made 6400.0 tokens/s and are the most allowed"


def test_it_goes_back_to_the_smaller_one_when_doubling_gains_nothing() -> None:
    size = BatchSize(256, automatic=True)
    assert until_settled(size, lambda batch: float(min(batch, 16))) == [4, 8, 16, 32, 16]
    assert size.reason == "16 made 16.0 tokens/s, 32 made 16.0"


@pytest.mark.parametrize(("gain", "settled"), [(GAIN + 0.01, 64), (GAIN - 0.01, 4)])
def test_the_least_gain_decides(gain: float, settled: int) -> None:
    size = BatchSize(64, automatic=True)
    doublings = {START << times: times for times in range(8)}
    until_settled(size, lambda batch: 100 * gain ** doublings[batch])
    assert size.limit == settled


@pytest.mark.parametrize("most", [1, 3, 4, 5, 100])
def test_the_most_allowed_bounds_it_even_between_doublings(most: int) -> None:
    size = BatchSize(most, automatic=True)
    limits = until_settled(size, lambda batch: 100.0 * batch)
    assert limits[0] == min(START, most)
    assert limits[-1] == size.limit == most
    assert f"{most} made" in size.reason


@pytest.mark.parametrize("asked", [1, 7, 256])
def test_a_size_that_was_asked_for_never_changes(asked: int) -> None:
    size = BatchSize(asked, automatic=False)
    assert size.reason == "as asked for"
    assert run(size, lambda batch: 1.0 / batch, 3 * STEPS_BETWEEN_TRIALS) == [asked]


def test_while_it_climbs_the_reason_says_so_with_the_rate() -> None:
    size = BatchSize(64, automatic=True)
    assert size.reason == "not measured yet"
    run(size, lambda batch: 100.0 * batch, 1 + STEPS)
    assert (size.limit, size.reason) == (8, "4 made 400.0 tokens/s, more are being tried")


def test_steps_with_places_free_say_nothing_about_a_size() -> None:
    size = BatchSize(64, automatic=True)
    assert run(size, lambda batch: 100.0 * batch, 1000, waiting=START - 1) == [START]
    assert size.reason == "not measured yet"


def test_the_step_in_which_the_batch_fills_up_is_left_out() -> None:
    """It is mostly prefill: taken in, it would make every new size look slow."""
    size = BatchSize(16, automatic=True)
    for limit in (4, 8, 16):
        assert size.limit == limit
        size.observe(limit, 0, 1000.0)
        for _ in range(STEPS):
            size.observe(limit, limit, 0.01)
    assert size.reason == "16 made 1600.0 tokens/s and are the most allowed"


def test_a_measurement_waits_for_tokens_and_not_only_for_steps() -> None:
    """Steps that did nothing but prefill would give a rate of zero."""
    size = BatchSize(64, automatic=True)
    for _ in range(10 * STEPS):
        size.observe(START, 0, 0.01)
    assert size.limit == START
    for _ in range(2):
        size.observe(START, START, 0.01)
    assert size.limit == 2 * START


def test_after_a_long_while_it_looks_again_and_follows_what_has_changed() -> None:
    """A trial begins at half the size: a rate that has fallen is followed down by a half a trial."""
    size = BatchSize(64, automatic=True)
    until_settled(size, lambda batch: float(min(batch, 32)))
    trial = STEPS_BETWEEN_TRIALS + 10 * STEPS
    found = []
    for best in (32, 8, 8, 8, 64):
        run(size, lambda batch: float(min(batch, best)), trial)  # noqa: B023
        found.append(size.limit)
    assert found == [32, 16, 8, 8, 64]


def test_before_that_while_is_over_a_settled_size_stays() -> None:
    size = BatchSize(64, automatic=True)
    while size.reason != "32 made 32.0 tokens/s, 64 made 32.0":
        run(size, lambda batch: float(min(batch, 32)), 1)
    assert run(size, lambda batch: 1.0, STEPS_BETWEEN_TRIALS - 1) == [32]
    assert run(size, lambda batch: 1.0, 1) == [32, 16]


def test_memory_that_holds_fewer_is_named_as_the_reason() -> None:
    size = BatchSize(64, automatic=True)
    size.held_back(3)
    assert size.reason == "the memory for keys and values holds 3"
    assert size.limit == START
    other = BatchSize(64, automatic=True)
    other.held_back(START)
    assert other.reason == "not measured yet"
