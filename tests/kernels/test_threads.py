from __future__ import annotations

import threading

import pytest

from edgemoe.kernels.cpu.threads import MIN_SPLIT_NBYTES, KernelThreads


@pytest.mark.parametrize("count", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("number", [1, 2, 3, 8])
def test_every_row_is_run_once(number: int, count: int) -> None:
    threads = KernelThreads(number)
    spans: list[tuple[int, int]] = []
    threads.split(count, lambda first, last: spans.append((first, last)), nbytes=MIN_SPLIT_NBYTES)
    assert sorted(row for first, last in spans for row in range(first, last)) == list(range(count))
    assert len([span for span in spans if span[0] < span[1]]) <= number
    threads.close()


def test_a_small_read_is_not_split() -> None:
    threads = KernelThreads(4)
    ran: list[tuple[int, int, str]] = []
    threads.split(9, lambda first, last: ran.append((first, last, threading.current_thread().name)), nbytes=1000)
    assert ran == [(0, 9, threading.current_thread().name)]
    threads.close()


def test_a_large_read_is_split_over_all_threads_and_the_caller() -> None:
    threads = KernelThreads(3)
    together = threading.Barrier(3)
    names: set[str] = set()

    def run(first: int, last: int) -> None:
        together.wait(10)
        names.add(threading.current_thread().name)

    threads.split(3, run, nbytes=MIN_SPLIT_NBYTES)
    assert len(names) == 3
    assert threading.current_thread().name in names
    threads.close()


def test_an_error_in_a_part_is_raised() -> None:
    threads = KernelThreads(2)

    def run(first: int, last: int) -> None:
        if first > 0:
            raise ValueError("bad row")

    with pytest.raises(ValueError, match="bad row"):
        threads.split(4, run, nbytes=MIN_SPLIT_NBYTES)
    threads.close()


@pytest.mark.parametrize("number", [-1, 0, 1])
def test_one_thread_is_the_caller(number: int) -> None:
    threads = KernelThreads(number)
    assert threads.count == 1
    ran: list[tuple[int, int]] = []
    threads.split(5, lambda first, last: ran.append((first, last)), nbytes=1 << 30)
    assert ran == [(0, 5)]
    threads.close()
    threads.close()
