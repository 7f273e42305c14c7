from __future__ import annotations

import signal
import threading

import pytest

from edgemoe.cli.interruption import Interruption


def test_each_ctrl_c_takes_a_step_and_one_more_raises() -> None:
    taken: list[str] = []
    threads: list[threading.Thread] = []

    def step(name: str) -> None:
        threads.append(threading.current_thread())
        taken.append(name)

    before = signal.getsignal(signal.SIGINT)
    with Interruption(lambda: step("first"), lambda: step("second")) as interruption:
        assert not interruption.requested
        signal.raise_signal(signal.SIGINT)
        assert interruption.count == 1
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert sorted(taken) == ["first", "second"]
    assert threading.main_thread() not in threads
    assert signal.getsignal(signal.SIGINT) is before


def test_what_waits_is_woken_by_the_first() -> None:
    woken = []
    with Interruption(lambda: None, lambda: None) as interruption:
        with pytest.raises(KeyboardInterrupt), interruption.waiting():
            signal.raise_signal(signal.SIGINT)
        woken.append(interruption.count)
        signal.raise_signal(signal.SIGINT)
        woken.append(interruption.count)
    assert woken == [1, 2]


def test_only_the_signals_that_are_named_are_taken() -> None:
    on_terminate = signal.getsignal(signal.SIGTERM)
    with Interruption(lambda: None):
        assert signal.getsignal(signal.SIGTERM) is on_terminate
    with Interruption(lambda: None, signals=(signal.SIGTERM,)) as interruption:
        signal.raise_signal(signal.SIGTERM)
        assert interruption.requested
    assert signal.getsignal(signal.SIGTERM) is on_terminate


def test_another_thread_than_the_main_one_sets_no_handler() -> None:
    before = signal.getsignal(signal.SIGINT)
    during = []

    def work() -> None:
        with Interruption(lambda: None):
            during.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert during == [before]
