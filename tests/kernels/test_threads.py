from __future__ import annotations

import threading

import pytest

from edgemoe.kernels.cpu.threads import WORTH_SPLITTING, Workers


@pytest.mark.parametrize("count", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_every_row_is_run_once(threads: int, count: int) -> None:
    workers = Workers(threads)
    spans: list[tuple[int, int]] = []
    workers.split(count, lambda first, last: spans.append((first, last)), nbytes=WORTH_SPLITTING)
    assert sorted(row for first, last in spans for row in range(first, last)) == list(range(count))
    assert len([span for span in spans if span[0] < span[1]]) <= threads
    workers.close()


def test_little_work_stays_with_the_caller() -> None:
    workers = Workers(4)
    ran: list[tuple[int, int, str]] = []
    workers.split(9, lambda first, last: ran.append((first, last, threading.current_thread().name)), nbytes=1000)
    assert ran == [(0, 9, threading.current_thread().name)]
    workers.close()


def test_much_work_runs_on_several_threads_the_caller_among_them() -> None:
    workers = Workers(3)
    together = threading.Barrier(3)
    names: set[str] = set()

    def run(first: int, last: int) -> None:
        together.wait(10)
        names.add(threading.current_thread().name)

    workers.split(3, run, nbytes=WORTH_SPLITTING)
    assert len(names) == 3
    assert threading.current_thread().name in names
    workers.close()


def test_an_error_in_a_part_is_raised() -> None:
    workers = Workers(2)

    def run(first: int, last: int) -> None:
        if first > 0:
            raise ValueError("bad row")

    with pytest.raises(ValueError, match="bad row"):
        workers.split(4, run, nbytes=WORTH_SPLITTING)
    workers.close()


@pytest.mark.parametrize("threads", [-1, 0, 1])
def test_there_is_always_the_caller(threads: int) -> None:
    workers = Workers(threads)
    assert workers.threads == 1
    ran: list[tuple[int, int]] = []
    workers.split(5, lambda first, last: ran.append((first, last)), nbytes=1 << 30)
    assert ran == [(0, 5)]
    workers.close()
    workers.close()
