"""How requests, streams and engines end early: cancelled, interrupted, closed, forgotten."""

from __future__ import annotations

import gc
import itertools
import signal
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from edgemoe import EdgeMoEError, Engine, Sampling, Stream
from edgemoe.results import Progress
from tests.support.clean import check_clean

SETTINGS = Sampling(max_tokens=8, ignore_eos=True, temperature=0)
LONG = Sampling(max_tokens=400, ignore_eos=True, temperature=0)
PROMPT = "a long prompt, which takes a while, " * 10
LAYERS = (0, 1, 3)
"""Layers of passes that something happens before."""
SLOW_GBPS = 0.02
"""A record of the talker takes 4 ms, a layer of a long prompt some 30, and the whole prompt a tenth of a second."""


@pytest.fixture
def engine(talker: Path) -> Iterator[Engine]:
    with Engine.load(talker, expert_cache=8, threads=1, batch=4, state_folder="none", link_gbps=SLOW_GBPS) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def expected(talker: Path) -> dict[str, tuple[int, ...]]:
    with Engine.load(talker, threads=1, batch=1, state_folder="none") as single:
        return {prompt: single.generate(prompt, SETTINGS).token_ids for prompt in ("abc", "xyz", PROMPT)}


@contextmanager
def within_a_pass(engine: Engine, layer: int, act: Callable[[], object], *, waits: bool = True) -> Iterator[None]:
    """Has another thread call `act` once so many layers have been reached; the pass `waits` until it has returned."""
    runtime = engine._runtime
    assert runtime is not None
    layers, poll, reached = runtime.layers, runtime.layers.poll, itertools.count()
    thread = threading.Thread(target=act)

    def acting() -> None:
        if next(reached) == layer:
            thread.start()
            thread.join(60 if waits else 0.1)
        poll()

    layers.poll = acting
    try:
        yield
    finally:
        layers.poll = poll
        thread.join(60)


@contextmanager
def later(seconds: float, act: Callable[[], object]) -> Iterator[None]:
    timer = threading.Timer(seconds, act)
    timer.start()
    try:
        yield
    finally:
        timer.join()


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt in the main thread, also where these tests run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def press(number: int = signal.SIGINT) -> None:
    """Sends a signal to the main thread."""
    signal.pthread_kill(threading.main_thread().ident or 0, number)


def rest(stream: Stream) -> list[str | None]:
    return [chunk.finish_reason for chunk in stream]


def test_a_closed_engine_has_no_thread_that_lives_on_for_a_moment(talker: Path) -> None:
    engine = Engine.load(talker, threads=1, state_folder="none")
    worker = engine._worker
    end = worker._end

    def end_late() -> None:
        end()
        time.sleep(0.1)

    worker._end = end_late  # type: ignore[method-assign]
    engine.close()
    assert not worker._thread.is_alive()


@pytest.mark.parametrize("layer", LAYERS)
def test_a_prompt_is_cancelled_between_two_layers(
    layer: int, engine: Engine, expected: dict[str, tuple[int, ...]]
) -> None:
    stream = engine.stream(PROMPT, SETTINGS)
    with within_a_pass(engine, layer, stream.cancel):
        assert rest(stream) == ["cancelled"]
    assert stream.finished
    check_clean(engine)
    assert engine.generate(PROMPT, SETTINGS).token_ids == expected[PROMPT]


def test_a_stream_is_closed_by_another_thread_while_it_is_waited_for(
    engine: Engine, expected: dict[str, tuple[int, ...]]
) -> None:
    stream = engine.stream(PROMPT, LONG)
    with within_a_pass(engine, 1, stream.close):
        assert rest(stream) == []
    check_clean(engine)
    assert engine.generate("abc", SETTINGS).token_ids == expected["abc"]


def test_one_of_several_is_cancelled_and_the_others_go_on(engine: Engine, expected: dict[str, tuple[int, ...]]) -> None:
    goes, ends = engine.stream("abc", SETTINGS), engine.stream(PROMPT, SETTINGS)
    with within_a_pass(engine, 1, ends.cancel):
        tokens = [token for chunk in goes for token in chunk.token_ids]
    assert tuple(tokens) == expected["abc"]
    assert rest(ends)[-1] == "cancelled"
    check_clean(engine)


def test_who_waits_is_told_at_once_though_the_step_goes_on_for_others(engine: Engine) -> None:
    """The end of one does not wait for the prompt of another."""
    ends, other = engine.stream("abc", LONG), engine.stream(PROMPT, LONG)
    told: list[str | None] = []
    thread = threading.Thread(target=lambda: told.extend(rest(ends)))
    thread.start()
    time.sleep(0.02)
    ends.cancel()
    thread.join(60)
    assert told[-1:] == ["cancelled"]
    other.close()
    check_clean(engine)


def test_the_tokens_of_a_prompt_that_was_cut_are_kept(talker: Path) -> None:
    with Engine.load(talker, expert_cache=8, threads=1, state_folder="none", prefill_chunk=32) as engine:
        stream = engine.stream(PROMPT, SETTINGS)
        runner = engine._loop.runner.model
        run, passes = runner.run_sampled, list[int]()

        def cut(inputs: Sequence[Any]) -> Any:
            passes.append(len(inputs[0].tokens))
            if len(passes) == 3:
                stream.cancel()
            return run(inputs)

        runner.run_sampled = cut  # type: ignore[method-assign]
        assert rest(stream) == ["cancelled"]
        runner.run_sampled = run  # type: ignore[method-assign]
        assert engine.generate(PROMPT, SETTINGS).timings.shared_tokens == 64


def test_how_far_a_prompt_has_come_is_told_meanwhile(engine: Engine) -> None:
    stream = engine.stream(PROMPT, SETTINGS)
    assert stream.prompt_tokens == engine.count_tokens(PROMPT)
    assert stream.prompt_done == 0
    runtime, seen = engine._runtime, list[int]()
    assert runtime is not None
    poll = runtime.layers.poll

    def look() -> None:
        seen.append(stream.prompt_done)
        poll()

    runtime.layers.poll = look
    next(stream)
    runtime.layers.poll = poll
    assert sorted(seen) == seen
    assert len(set(seen)) > 2
    assert stream.prompt_done == stream.prompt_tokens
    stream.close()


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupt_ends_the_call_and_tears_nothing(
    layer: int, engine: Engine, expected: dict[str, tuple[int, ...]]
) -> None:
    with pytest.raises(KeyboardInterrupt), within_a_pass(engine, layer, press):
        engine.generate(PROMPT, LONG)
    check_clean(engine)
    assert engine.generate("abc", SETTINGS).token_ids == expected["abc"]


@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupt_is_for_one_stream_and_not_for_those_of_other_threads(
    engine: Engine, expected: dict[str, tuple[int, ...]]
) -> None:
    found: list[tuple[int, ...]] = []
    thread = threading.Thread(target=lambda: found.append(engine.generate("xyz", SETTINGS).token_ids))
    stream = engine.stream(PROMPT, LONG)
    thread.start()
    with pytest.raises(KeyboardInterrupt), within_a_pass(engine, 1, press):
        list(stream)
    thread.join(60)
    assert found == [expected["xyz"]]
    assert list(stream) == []
    check_clean(engine)


def test_an_engine_is_closed_by_a_handler_of_a_signal_while_it_computes(talker: Path) -> None:
    engine = Engine.load(talker, expert_cache=8, threads=1, state_folder="none", link_gbps=SLOW_GBPS)
    before = signal.signal(signal.SIGUSR1, lambda number, frame: engine.close())
    try:
        with within_a_pass(engine, 1, lambda: press(signal.SIGUSR1)):
            ends = rest(engine.stream(PROMPT, LONG))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert ends == ["cancelled"]
    with pytest.raises(EdgeMoEError, match="the engine is closed"):
        engine.generate("abc")


def test_an_engine_that_nobody_has_is_freed_with_a_warning(talker: Path) -> None:
    others = set(threading.enumerate())
    engine = Engine.load(talker, expert_cache=8, threads=2, state_folder="none")
    engine.generate("abc", SETTINGS)
    runtime = engine._runtime
    assert runtime is not None
    weights = weakref.ref(runtime.model.get_input_embeddings().weight)
    slots = weakref.ref(runtime.cache.pool)
    del runtime

    def own() -> list[str]:
        return [each.name for each in set(threading.enumerate()) - others if each.name.startswith("edgemoe")]

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        del engine
        gc.collect()
    assert any("was not closed: call close" in str(each.message) for each in told)
    end = time.monotonic() + 10
    while time.monotonic() < end and own():
        time.sleep(0.01)
    gc.collect()
    assert weights() is None
    assert slots() is None
    assert not own()


def test_a_closed_engine_warns_of_nothing(talker: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine = Engine.load(talker, expert_cache=8, threads=1, state_folder="none")
        engine.close()
        del engine
        gc.collect()


def test_an_error_that_somebody_keeps_keeps_no_model(talker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine.load(talker, expert_cache=8, threads=1, state_folder="none")
    runtime = engine._runtime
    assert runtime is not None
    weights = weakref.ref(runtime.model.get_input_embeddings().weight)

    def fails(*arguments: Any) -> Any:
        raise ValueError("a fault of the pass")

    monkeypatch.setattr(runtime.layers, "forward", fails)
    del runtime
    with pytest.raises(EdgeMoEError, match="a fault of the pass") as kept:
        engine.generate("abc", SETTINGS)
    monkeypatch.undo()
    engine.close()
    gc.collect()
    assert isinstance(kept.value.__cause__, ValueError)
    assert weights() is None


def test_what_was_cancelled_in_a_step_that_fails_leaves_no_half_of_a_pass(
    talker: Path, expected: dict[str, tuple[int, ...]]
) -> None:
    with Engine.load(talker, threads=1, batch=4, state_folder="none") as engine:
        ends, fails = engine.stream(PROMPT, LONG), engine.stream("abc", LONG)
        next(ends)
        runtime, loop = engine._runtime, engine._loop
        assert runtime is not None
        layers, poll = runtime.layers, runtime.layers.poll

        def breaks() -> None:
            poll()
            if layers.reached == 1:
                loop.cancel(lambda request: request is ends._request)
                raise OSError("the disk is gone")

        layers.poll = breaks
        with pytest.raises(EdgeMoEError, match="the disk is gone"):
            list(fails)
        layers.poll = poll
        assert rest(ends)[-1] == "cancelled"
        kept = engine._between_steps(lambda loop: [each.cache for each in loop.scheduler._prefixes.kept])
        assert [{layer.get_seq_length() for layer in cache.kv.layers} for cache in kept] == [
            {cache.tokens} for cache in kept
        ]
        assert engine.generate(PROMPT, SETTINGS).token_ids == expected[PROMPT]


def test_a_process_ends_while_an_engine_computes(talker: Path) -> None:
    """The thread has left the model's code by then: PyTorch aborts where it is stopped in the middle."""
    code = f"""
import threading, time
from edgemoe import Engine, Sampling
engine = Engine.load({str(talker)!r}, threads=1, state_folder="none", link_gbps={SLOW_GBPS}, expert_cache=8)
settings = Sampling(max_tokens=400, ignore_eos=True)
threading.Thread(target=engine.generate, args=("abc", settings), daemon=True).start()
time.sleep(0.1)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_stream_that_nobody_has_ends_its_request(engine: Engine) -> None:
    stream = engine.stream("abc", LONG)
    next(stream)
    del stream
    check_clean(engine)


def test_loading_stops_when_it_is_told_to(talker: Path) -> None:
    others = set(threading.enumerate())
    stop = threading.Event()
    begun = threading.Event()

    def on_progress(progress: Progress) -> None:
        begun.set()
        time.sleep(0.01)

    def set_stop() -> None:
        begun.wait(20)
        stop.set()

    thread = threading.Thread(target=set_stop)
    thread.start()
    with pytest.raises(EdgeMoEError, match="stop was set"):
        Engine.load(talker, expert_cache=8, threads=1, state_folder="none", on_progress=on_progress, stop=stop)
    thread.join()
    end = time.monotonic() + 10
    while time.monotonic() < end and set(threading.enumerate()) - others:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - others


def test_a_read_that_never_returns_holds_up_neither_cancel_nor_close(
    talker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgemoe.cache.reader_link.CLOSE_SECONDS", 0.2)
    returns = threading.Event()
    engine = Engine.load(talker, expert_cache=8, threads=1, state_folder="none")
    try:
        engine.generate("abc", SETTINGS)
        runtime = engine._runtime
        assert runtime is not None
        pieces = runtime.cache.store.pieces

        def dead(expert: Any, memory: Any) -> Any:
            return [(nbytes, lambda: returns.wait(30)) for nbytes, _ in pieces(expert, memory)]

        monkeypatch.setattr(runtime.cache.store, "pieces", dead)
        stream = engine.stream(PROMPT, LONG)
        started = time.monotonic()
        with later(0.1, stream.cancel):
            assert rest(stream) == ["cancelled"]
        waits = engine.stream(PROMPT, LONG)
        with later(0.1, engine.close):
            assert rest(waits) in (["cancelled"], [])
        engine.close()
        assert time.monotonic() - started < 20
    finally:
        returns.set()
        engine.close()
        for thread in threading.enumerate():
            if thread.name.startswith("edgemoe-read"):
                thread.join(10)
