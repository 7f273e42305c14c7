"""Threads that run programs: every row once, each step after the one before, with threads that come late or never."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from edgemoe.kernels.cpu.arrays import Job
from edgemoe.kernels.cpu.program import Program, Step, run_program
from edgemoe.kernels.cpu.threads import MIN_SPLIT_NBYTES, KernelThreads
from edgemoe.kernels.rows import gathered

CALLED = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 4)


class PythonKernel:
    """In the place of native code: a function of Python, which gets the first row and the end of a share."""

    def __init__(self, run: Callable[[int, int], None]) -> None:
        self._called = CALLED(lambda job, scratch, first, last: run(first, last))
        self.address = int(ctypes.cast(self._called, ctypes.c_void_p).value or 0)


def step(run: Callable[[int, int], None], rows: int, *, nbytes: int = MIN_SPLIT_NBYTES, multiple: int = 1) -> Step:
    kernel: Any = PythonKernel(run)
    return Step(kernel, Job((0,), None), rows, nbytes, multiple)


class Moved:
    """Steps that move the rows of a matrix, each in another order: a row that came too early would show."""

    def __init__(self, rows: int, count: int, multiple: int = 1) -> None:
        generator = torch.Generator().manual_seed(rows)
        self.values = self.expected = torch.randn(rows, 8, generator=generator)
        self.steps: list[Step] = []
        for _ in range(count):
            order = torch.randperm(rows, generator=generator).tolist()
            self.values, own = gathered(self.values, order, torch.float32)
            self.expected = self.expected[order]
            self.steps += [each._replace(nbytes=MIN_SPLIT_NBYTES, multiple=multiple) for each in own]


@pytest.mark.parametrize("multiple", [1, 5])
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("number", [1, 2, 3, 8])
def test_every_row_is_run_once_in_whole_blocks(number: int, rows: int, multiple: int) -> None:
    threads, spans = KernelThreads(number), []
    threads.run([step(lambda first, last: spans.append((first, last)), rows, multiple=multiple)])
    assert sorted(row for first, last in spans for row in range(first, last)) == list(range(rows))
    assert all(first % multiple == 0 and (last % multiple == 0 or last == rows) for first, last in spans)
    threads.close()


@pytest.mark.parametrize("rows", [2, 7, 1000])
@pytest.mark.parametrize("number", [1, 2, 8])
def test_a_step_begins_when_all_rows_of_the_one_before_are_done(number: int, rows: int) -> None:
    threads = KernelThreads(number)
    for _ in range(20):
        moved = Moved(rows, 9)
        threads.run(moved.steps)
        assert torch.equal(moved.values, moved.expected)
    threads.close()


def test_a_thread_that_comes_late_finds_nothing_to_do() -> None:
    spans: list[tuple[int, int]] = []
    program = Program([step(lambda first, last: spans.append((first, last)), 50)])
    program.run()
    ran = list(spans)
    run_program.call(program._words.buffer_info()[0], 0, 0, 0)
    assert spans == ran


@pytest.mark.parametrize("number", [1, 2])
def test_a_program_that_runs_again_does_everything_again(number: int) -> None:
    threads, spans = KernelThreads(number), []
    program = threads.program(
        [step(lambda first, last: spans.append((first, last)), 50)._replace(nbytes=MIN_SPLIT_NBYTES)]
    )
    for _ in range(5):
        spans.clear()
        program.run()
        assert sorted(row for first, last in spans for row in range(first, last)) == list(range(50))
    threads.close()
    # A thread that has ended is one that comes late.
    spans.clear()
    program.run()
    assert sorted(row for first, last in spans for row in range(first, last)) == list(range(50))


def test_a_slow_thread_is_waited_for() -> None:
    threads = KernelThreads(2)
    done: set[int] = set()

    def run(first: int, last: int) -> None:
        time.sleep(0.2 if threading.current_thread() is not threading.main_thread() else 0.01)
        done.update(range(first, last))

    threads.run([step(run, 30)])
    assert done == set(range(30))
    threads.close()


@pytest.mark.parametrize("number", [2, 3])
def test_a_large_read_is_split_over_all_threads_and_the_caller(number: int) -> None:
    threads = KernelThreads(number)
    together = threading.Barrier(number)
    names: set[str] = set()

    def run(first: int, last: int) -> None:
        if threading.current_thread().name not in names:
            names.add(threading.current_thread().name)
            together.wait(20)

    threads.run([step(run, 100)])
    assert len(names) == number
    assert threading.current_thread().name in names
    threads.close()


@pytest.mark.parametrize("how", ["small", "alone"])
def test_a_small_read_is_the_callers(how: str) -> None:
    threads, names = KernelThreads(4), []
    work = step(
        lambda first, last: names.append(threading.current_thread().name),
        9,
        nbytes=MIN_SPLIT_NBYTES - 1 if how == "small" else MIN_SPLIT_NBYTES,
    )
    threads.run([work], alone=how == "alone")
    assert names == [threading.current_thread().name]
    threads.close()


@pytest.mark.parametrize("number", [-1, 0, 1])
def test_one_thread_is_the_caller(number: int) -> None:
    threads = KernelThreads(number)
    assert threads.count == 1
    spans: list[tuple[int, int]] = []
    threads.run([step(lambda first, last: spans.append((first, last)), 5, nbytes=1 << 30)])
    assert spans == [(0, 5)]
    threads.close()
    threads.close()


def test_programs_and_what_they_hold_are_freed() -> None:
    threads, freed = KernelThreads(2), threading.Event()

    class Held:
        def __del__(self) -> None:
            freed.set()

    work = step(lambda first, last: None, 100)
    work = work._replace(job=Job((0,), Held()))
    threads.run([work])
    del work
    assert freed.wait(10)
    threads.close()
