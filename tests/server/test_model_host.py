from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

from edgemoe import CheckpointError, EdgeMoEError, Engine, ModelHost, Sampling
from edgemoe.results import Progress
from tests.support.waiting import wait_until

SETTINGS: dict[str, Any] = {"threads": 1, "context": 128, "expert_cache": 8, "state_folder": "none"}


class Loader:
    """Makes engines that only count; `gate` holds loading up until it is set, `error` ends it."""

    def __init__(self) -> None:
        self.loaded = self.closed = 0
        self.together = 0
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None

    def __call__(
        self, model: Any, config: Any, *, on_progress: Callable[[Progress], None], stop: threading.Event
    ) -> Any:
        on_progress(Progress("weights", 1, 2))
        while not self.gate.wait(0.005):
            if stop.is_set():
                raise EdgeMoEError("stopped")
        if self.error is not None:
            raise self.error
        self.loaded += 1
        assert self.loaded - self.closed == 1, "two engines are in memory"
        return FakeEngine(self)


class FakeEngine:
    plan = "a plan"

    def __init__(self, loader: Loader) -> None:
        self.loader = loader
        self.closed = False

    def close(self) -> None:
        self.loader.closed += 1
        self.closed = True


def host(loader: Loader, keep_alive: float | None = None) -> ModelHost:
    return ModelHost(keep_alive=keep_alive, loader=loader)


def timer_of_a_lease(made: ModelHost) -> threading.Timer:
    """What unloads after the end of a lease."""
    with made.lease():
        pass
    assert made._timer is not None
    return made._timer


def test_it_loads_when_it_is_first_asked_for_and_says_the_librarys_words() -> None:
    greedy = Sampling(temperature=0, max_tokens=4)
    with ModelHost(**SETTINGS) as made:
        assert (made.state, made.engine) == ("unloaded", None)
        assert made.plan().context == 128
        with made.lease() as engine:
            assert made.state == "ready"
            assert made.engine is engine
            assert made.plan() is engine.plan
            said = engine.generate("Once upon", greedy)
        assert made.state == "ready"
        assert made.unload()
        assert made.state == "unloaded"
    with Engine.load(**SETTINGS) as engine:
        assert engine.generate("Once upon", greedy).token_ids == said.token_ids


def test_an_unknown_setting_is_refused_at_once() -> None:
    with pytest.raises(TypeError, match="no setting"):
        ModelHost(wishes=3)


def test_leases_share_one_engine_and_zero_seconds_unload_it_after_the_last() -> None:
    loader = Loader()
    with host(loader, keep_alive=0) as made:
        first, second = made.lease(), made.lease()
        with first as one, second as other:
            assert one is other
        first.release()
        assert made.leases == 0
        wait_until(lambda: loader.closed == 1)
        assert made.state == "unloaded"
        with made.lease():
            pass
    assert (loader.loaded, loader.closed) == (2, 2)


def test_it_unloads_after_some_seconds_without_a_lease() -> None:
    loader = Loader()
    with host(loader, keep_alive=5) as made:
        for _ in range(3):
            with made.lease():
                pass
        assert (loader.loaded, loader.closed) == (1, 0)
    loader = Loader()
    with host(loader, keep_alive=0.15) as made:
        with made.lease():
            time.sleep(0.3)
            assert loader.closed == 0
        wait_until(lambda: loader.closed == 1)
        made.load().result()
        wait_until(lambda: loader.closed == 2)


@pytest.mark.parametrize("keep_alive", [None, -1])
def test_it_stays_for_ever(keep_alive: float | None) -> None:
    loader = Loader()
    with host(loader, keep_alive) as made:
        with made.lease():
            pass
        time.sleep(0.05)
        assert made.state == "ready"
    assert loader.closed == 1


def test_unloading_waits_for_leases() -> None:
    loader = Loader()
    with host(loader) as made:
        lease = made.lease()
        with lease:
            assert not made.unload()
            assert made.state == "ready"
        wait_until(lambda: loader.closed == 1)
        assert made.unload()


def test_what_was_asked_for_last_counts() -> None:
    """A loading that is asked for while an unloading waits for leases."""
    loader = Loader()
    with host(loader) as made:
        with made.lease():
            assert not made.unload()
            made.load().result()
        assert made.state == "ready"
        assert loader.closed == 0


def test_a_later_lease_ends_the_wait_for_unloading() -> None:
    loader = Loader()
    with host(loader, keep_alive=5) as made:
        timer = timer_of_a_lease(made)
        with made.lease():
            timer.join(4)
            assert not timer.is_alive()
            assert (made._timer, loader.closed) == (None, 0)


def test_a_plan_is_waited_for_without_a_thread() -> None:
    loader = Loader()
    loader.gate.clear()
    with host(loader) as made:
        made.load()
        planned = made.begin_plan()
        assert not planned.done()
        loader.gate.set()
        assert str(planned.result(60)) == "a plan"
        with made.lease() as engine:
            assert made.begin_plan().result(0) is engine.plan


def test_an_error_of_loading_reaches_everybody_and_the_next_one_tries_again() -> None:
    loader = Loader()
    loader.error = CheckpointError("it is damaged")
    loader.gate.clear()
    with host(loader) as made:
        leases = [made.lease() for _ in range(3)]
        wait_until(lambda: made.progress is not None)
        assert made.state == "loading"
        loader.gate.set()
        for lease in leases:
            with pytest.raises(CheckpointError, match="damaged"), lease:
                pass
        assert (made.state, made.leases, str(made.error)) == ("unloaded", 0, "it is damaged")
        loader.error = None
        with made.lease():
            assert made.error is None


@pytest.mark.parametrize("end", ["close", "unload"])
def test_loading_is_stopped(end: str) -> None:
    loader = Loader()
    loader.gate.clear()
    made = host(loader)
    loading: Future[Engine] = made.load()
    wait_until(lambda: made.progress is not None)
    began = time.monotonic()
    getattr(made, end)()
    with pytest.raises(EdgeMoEError):
        loading.result(5)
    assert time.monotonic() - began < 2
    assert made.state == "unloaded"
    made.close()
    assert loader.loaded == loader.closed


def test_a_real_loading_is_stopped() -> None:
    before = set(threading.enumerate())
    made = ModelHost(**SETTINGS)
    loading = made.load()
    made.close()
    with pytest.raises(EdgeMoEError):
        loading.result(30)
    # What was read is given back soon after.
    wait_until(lambda: not [each for each in set(threading.enumerate()) - before if each.name.startswith("edgemoe")])


def test_after_the_end_it_refuses() -> None:
    made = host(Loader())
    made.close()
    made.close()
    for ask in (made.lease, made.load, made.plan):
        with pytest.raises(EdgeMoEError, match="closed"):
            ask()


def test_many_threads_never_see_a_closed_engine_nor_two() -> None:
    loader = Loader()
    wrong: list[str] = []

    def work(made: ModelHost, number: int) -> None:
        for turn in range(40):
            with made.lease() as engine:
                closed = loader.closed
                time.sleep(0.0005)
                if made.engine is not engine or loader.closed != closed:
                    wrong.append("it was unloaded under a lease")
            time.sleep(0.002 * (number + turn % 3))
            if (turn + number) % 7 == 0:
                made.unload()

    with host(loader, keep_alive=0.001) as made:
        threads = [threading.Thread(target=work, args=(made, number)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert loader.loaded == loader.closed > 1


def test_whoever_is_told_of_the_engine_may_ask_the_host() -> None:
    loader = Loader()
    loader.gate.clear()
    told: list[Any] = []
    with host(loader) as made:
        made.load().add_done_callback(lambda ready: told.append(made.lease().ready.result().plan))
        loader.gate.set()
        wait_until(lambda: told == ["a plan"])


def test_loading_again_keeps_the_engine_for_as_long_again() -> None:
    loader = Loader()
    with host(loader, keep_alive=60) as made:
        before = timer_of_a_lease(made)
        made.load().result()
        assert made._timer is not before
        before.join(10)
        assert loader.closed == 0


def test_a_thread_that_cannot_be_started_leaves_nothing_to_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with host(Loader()) as made:
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", fail)
            with pytest.raises(RuntimeError, match="can't start"):
                made.load()
        assert (made.state, made.leases) == ("unloaded", 0)


def test_an_engine_that_cannot_be_closed_is_waited_for_by_nobody() -> None:
    class Broken(FakeEngine):
        def close(self) -> None:
            raise OSError("disk gone")

    def load(model: Any, config: Any, *, on_progress: Any, stop: threading.Event) -> Any:
        assert stop.wait(20)
        return Broken(Loader())

    with ModelHost(loader=load) as made:
        ready = made.load()
        assert made.unload()
        with pytest.raises(EdgeMoEError, match="unloaded while it was loaded"):
            ready.result()


def test_an_engine_that_has_ended_is_loaded_again() -> None:
    def fail(loop: object) -> None:
        raise AssertionError("a slot is lost")

    with ModelHost(**SETTINGS) as made, made.lease() as engine:
        engine._worker.post(fail)
        with pytest.raises(EdgeMoEError, match=r"ended with AssertionError \(a slot is lost\): load it") as told:
            engine.generate("Once upon")
        assert told.value.__cause__ is not None
        assert "in fail" in str(told.value.__cause__.__cause__), "where it happened"
        assert engine.closed
        assert (made.state, made.engine) == ("unloaded", None)
        with made.lease() as another:
            assert len(another.generate("Once upon", Sampling(max_tokens=3, ignore_eos=True)).token_ids) == 3
        assert (made.state, made.leases) == ("ready", 1)
