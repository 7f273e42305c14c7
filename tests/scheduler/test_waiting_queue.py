"""The order in which requests get their turn: neighbours in their tokens together, and nobody overtaken for ever."""

from __future__ import annotations

import random
from typing import Any

import pytest

from edgemoe.request.token_key import token_key
from edgemoe.scheduler.waiting_queue import WaitingQueue


class Request:
    """Stands in for a generation: the line looks at nothing but its key."""

    def __init__(self, number: int, tokens: list[int]) -> None:
        self.number = number
        self.tokens = tokens
        self.key = token_key(tokens)


def line_of(prompts: list[list[int]], patience: int = 64) -> tuple[Any, list[Request]]:
    line: Any = WaitingQueue(patience)
    requests = [Request(number, tokens) for number, tokens in enumerate(prompts)]
    for request in requests:
        line.add(request)
    return line, requests


def drained(line: Any) -> list[Request]:
    return [line.take_first() for _ in range(len(line))]


@pytest.mark.parametrize("patience", [0, 1, 3, 20])
@pytest.mark.parametrize("seed", range(6))
def test_nobody_is_overtaken_by_more_than_patience_allows(seed: int, patience: int) -> None:
    """Random arrivals, turns, removals and preemptions, with newcomers that always sort before the oldest."""
    draw = random.Random(seed)
    line: Any = WaitingQueue(patience)
    inside: list[Request] = []
    preempted: list[Request] = []
    running: list[Request] = []
    taken: list[Request] = []
    arrived = 0
    for _ in range(600):
        what = draw.random()
        if what < 0.5:
            # The first one sorts last, so that going round alone would never come to it.
            tokens = [draw.randint(0, 3) for _ in range(draw.randint(1, 4))] if arrived else [9]
            inside.append(Request(arrived, tokens))
            line.add(inside[-1])
            arrived += 1
        elif what < 0.85 and len(line):
            expected = line.first()
            got = line.take_first()
            assert got is expected
            if preempted:
                assert got is preempted.pop(0)
            else:
                inside.remove(got)
                overtaken_by = sum(other.number > got.number for other in taken)
                assert len(taken) <= got.number + patience
                assert overtaken_by <= patience
                taken.append(got)
            running.append(got)
        elif what < 0.92 and running:
            back = running.pop(draw.randrange(len(running)))
            line.put_back(back)
            preempted.insert(0, back)
        elif inside or preempted:
            unwanted = {each for each in [*inside, *preempted] if draw.random() < 0.1}
            line.remove_if(unwanted)
            inside = [each for each in inside if each not in unwanted]
            preempted = [each for each in preempted if each not in unwanted]
        assert len(line) == len(inside) + len(preempted)
        assert list(line) == [*preempted, *inside]
    assert len(taken) > 50


def test_requests_that_begin_alike_have_their_turns_together() -> None:
    """Three headers, arriving in turns, come out header by header."""
    prompts = [[header, 50, question] for question in range(5) for header in (3, 1, 2)]
    line, _ = line_of(prompts)
    turns = [request.tokens for request in drained(line)]
    assert turns == sorted(prompts)


def test_it_goes_on_from_where_it_is_and_begins_again_at_the_end() -> None:
    line, requests = line_of([[5], [3]])
    assert line.take_first() is requests[1]
    for number, tokens in ((2, [1]), (3, [4]), (4, [2])):
        line.add(Request(number, tokens))
    assert [request.tokens for request in drained(line)] == [[4], [5], [1], [2]]


def test_equal_prompts_come_in_the_order_of_their_arrival() -> None:
    line, requests = line_of([[7, 7]] * 4)
    assert drained(line) == requests


def test_with_no_patience_the_order_is_that_of_arrival() -> None:
    line, requests = line_of([[5], [1], [4], [2]], patience=0)
    assert drained(line) == requests


def test_who_was_preempted_is_first_the_latest_of_them_before_the_others() -> None:
    """The one that lost its place last was the oldest of those that did."""
    line, requests = line_of([[1], [2], [3], [4]])
    first, second = line.take_first(), line.take_first()
    line.put_back(second)
    line.put_back(first)
    assert line.first() is first
    assert drained(line) == [first, second, *requests[2:]]


def test_who_is_preempted_does_not_use_up_the_patience_of_others() -> None:
    line, requests = line_of([[9], [1], [2], [3]], patience=2)
    runner = line.take_first()
    for _ in range(10):
        line.put_back(runner)
        assert line.take_first() is runner
    assert line.take_first() is requests[2]
    assert line.take_first() is requests[0], "the oldest, after two that came later"


def test_what_is_removed_is_gone_wherever_it_was() -> None:
    line, requests = line_of([[number] for number in range(6)])
    runner = line.take_first()
    line.put_back(runner)
    line.remove_if({runner, requests[3], requests[5]})
    assert drained(line) == [requests[1], requests[2], requests[4]]
    assert len(line) == 0
    assert list(line) == []
