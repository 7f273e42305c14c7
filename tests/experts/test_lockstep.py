"""Passes in lockstep: which wait for which at which layer, what each gets, and what an error leaves behind."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from greenlet import getcurrent, greenlet

from edgemoe.experts.lockstep import LockstepPasses
from tests.support.checkpoints import Zoo, running


class Layer:
    """A fake MoE layer: adds its number and the weights, and logs which passes it computed together."""

    def __init__(self, number: int, log: list[tuple[int, list[int]]]) -> None:
        self.number = number
        self._log = log

    def compute_together(self, hidden: Any, index: Any, weights: Any) -> list[torch.Tensor]:
        self._log.append((self.number, [int(each[0]) for each in index]))
        return [each + self.number + more for each, more in zip(hidden, weights, strict=True)]


class Passes:
    """A `LockstepPasses`, its layers, and tasks that call some of them."""

    def __init__(self, layers: int = 4) -> None:
        self.log: list[tuple[int, list[int]]] = []
        self.layers: list[Any] = [Layer(number, self.log) for number in range(layers)]
        self.lockstep = LockstepPasses()

    def visiting(self, name: int, numbers: list[int], then: Callable[[], Any] = lambda: None) -> Callable[[], float]:
        """A task that calls the layers `numbers` in turn; returns 100 times its name, plus what the layers added."""

        def task() -> float:
            hidden = torch.tensor([100.0 * name])
            for number in numbers:
                layer = self.layers[number]
                hidden = self.lockstep.wait_for_others(layer, hidden, torch.tensor([name]), torch.tensor([0.5]))
            then()
            return float(hidden)

        return task


def expected(name: int, numbers: list[int]) -> float:
    return 100.0 * name + sum(numbers) + 0.5 * len(numbers)


def test_all_passes_wait_at_every_layer_and_results_keep_their_order() -> None:
    passes = Passes()
    results = passes.lockstep.run([passes.visiting(name, [0, 1, 2, 3]) for name in (3, 1, 2)])
    assert results == [expected(name, [0, 1, 2, 3]) for name in (3, 1, 2)]
    assert passes.log == [(number, [3, 1, 2]) for number in range(4)]


def test_passes_wait_only_for_those_that_still_run() -> None:
    visits = {1: [0, 1, 2, 3], 2: [1, 3], 3: [], 4: [3]}
    passes = Passes()
    results = passes.lockstep.run([passes.visiting(*each) for each in visits.items()])
    assert results == [expected(*each) for each in visits.items()]
    assert passes.log == [(0, [1]), (1, [1, 2]), (2, [1]), (3, [1, 2, 4])]


@pytest.mark.parametrize("seed", range(5))
def test_every_layer_is_computed_once_for_all_passes_that_call_it(seed: int) -> None:
    draw = random.Random(seed)
    visits = {name: sorted(draw.sample(range(10), draw.randint(0, 10))) for name in range(draw.randint(1, 12))}
    passes = Passes(10)
    results = passes.lockstep.run([passes.visiting(*each) for each in visits.items()])
    assert results == [expected(*each) for each in visits.items()]
    visited = sorted({number for numbers in visits.values() for number in numbers})
    assert [number for number, _ in passes.log] == visited
    for number, names in passes.log:
        assert names == [name for name, numbers in visits.items() if number in numbers]


def test_no_task_is_no_result() -> None:
    assert LockstepPasses().run([]) == []


def ending(ended: list[int], name: int, task: Callable[[], float]) -> Callable[[], float]:
    """`task`, which notes in `ended` that it was abandoned."""

    def wrapped() -> float:
        try:
            return task()
        finally:
            ended.append(name)

    return wrapped


@pytest.mark.parametrize("visits", [[], [0], [0, 1, 2]])
def test_an_error_in_one_pass_abandons_the_others_and_is_raised(visits: list[int]) -> None:
    """Before its first layer, between two, and after the others have finished."""
    passes, ended = Passes(), list[int]()

    def fail() -> None:
        raise ArithmeticError("in the second")

    tasks = [
        passes.visiting(1, [0, 1, 2, 3]),
        passes.visiting(2, visits, fail),
        passes.visiting(3, [1]),
        passes.visiting(4, [0, 1, 2, 3]),
    ]
    with pytest.raises(ArithmeticError, match="in the second"):
        passes.lockstep.run([ending(ended, name, task) for name, task in enumerate(tasks, start=1)])
    # Passes that had not begun are not abandoned.
    assert sorted(ended) == ([1, 2] if not visits else [1, 2, 3, 4])
    assert max([number for number, _ in passes.log], default=-1) <= max(visits, default=-1)


def test_an_error_in_a_layer_abandons_all_passes() -> None:
    passes, ended = Passes(), list[int]()

    def fail(*arguments: object) -> None:
        raise OSError("the link is down")

    passes.layers[2].compute_together = fail
    tasks = [ending(ended, name, passes.visiting(name, [0, 1, 2, 3])) for name in range(3)]
    with pytest.raises(OSError, match="the link is down"):
        passes.lockstep.run(tasks)
    assert ended == [0, 1, 2]
    assert [number for number, _ in passes.log] == [0, 1]


@pytest.mark.parametrize("fails", [False, True])
def test_no_greenlet_is_left_behind(fails: bool) -> None:
    """So nothing in its frames stays alive until the garbage collector runs."""
    greenlets: list[weakref.ref[greenlet]] = []
    outer = getcurrent()

    def noting(task: Callable[[], float]) -> Callable[[], float]:
        def noted() -> float:
            greenlets.append(weakref.ref(getcurrent()))
            return task()

        return noted

    def fail() -> None:
        if fails:
            raise KeyboardInterrupt

    gc.collect()
    gc.disable()
    try:
        passes = Passes()
        tasks = [passes.visiting(1, [0, 1, 2, 3]), passes.visiting(2, [0, 1], fail), passes.visiting(3, [1, 2])]
        with pytest.raises(KeyboardInterrupt) if fails else nullcontext() as raised:
            passes.lockstep.run([noting(task) for task in tasks])
        del raised
        assert len(greenlets) == 3
        assert [each() for each in greenlets] == [None] * 3
        assert getcurrent() is outer
    finally:
        gc.enable()


def test_a_pass_outside_of_lockstep_computes_alone_also_after_lockstep_has_failed(zoo: Zoo) -> None:
    with running(zoo("mixtral")) as own:
        expected_logits = own.logits([5, 6, 7])

        def fail() -> torch.Tensor:
            own.logits([8, 9])
            raise ArithmeticError

        # Greenlets share the thread's modes, so passes in lockstep must not each set one.
        with torch.inference_mode(), own.layers.lockstep() as lockstep:
            found = lockstep.run([lambda: own.logits([5, 6, 7]), lambda: own.logits([200])])[0]
        torch.testing.assert_close(found, expected_logits, rtol=1e-4, atol=1e-4)
        with torch.inference_mode(), pytest.raises(ArithmeticError), own.layers.lockstep() as lockstep:
            lockstep.run([lambda: own.logits([5, 6, 7]), fail])
        assert torch.equal(own.logits([5, 6, 7]), expected_logits)
        own.cache.check_integrity()
