"""A KeyboardInterrupt at any instruction of a caller: nothing hangs, nothing is lost, the next reply is right."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from edgemoe import Engine, Sampling
from tests.support.clean import check_clean
from tests.support.signal_points import SignalPoints

SETTINGS = Sampling(max_tokens=3, ignore_eos=True, temperature=0)
POINTS = 16
"""Instructions of each call at which it is interrupted, from the first to the last."""
HANG_SECONDS = 30.0


class Interrupt:
    """Counts the instructions of edgemoe in this thread at which Python tells of a signal, and raises KeyboardInterrupt
    at number `at`.
    """

    def __init__(self, at: int | None) -> None:
        self.seen = 0
        self._at = at
        self._points = SignalPoints()

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        if "edgemoe" not in frame.f_code.co_filename:
            return None
        if self._points.has(frame, event):
            self.seen += 1
            if self.seen == self._at:
                raise KeyboardInterrupt
        return self

    @contextmanager
    def tracing(self) -> Iterator[None]:
        before = sys.gettrace()
        sys.settrace(self)
        try:
            yield
        finally:
            sys.settrace(before)


def instructions(call: Callable[[], object]) -> int:
    counted = Interrupt(None)
    with counted.tracing():
        call()
    return counted.seen


def points(count: int) -> list[int]:
    return sorted({1 + number * (count - 1) // POINTS for number in range(POINTS + 1)})


@pytest.fixture(scope="module")
def engine(talker: Path) -> Iterator[Engine]:
    with Engine.load(talker, expert_cache=8, threads=1, batch=2, state_folder="none") as loaded:
        yield loaded


def _generate(engine: Engine) -> object:
    return engine.generate("abc", SETTINGS)


def _stream(engine: Engine) -> object:
    return list(engine.stream("abc", SETTINGS))


def _batch(engine: Engine) -> object:
    return list(engine.generate_batch([("abc", SETTINGS), ("xyz", SETTINGS)]))


def _chat(engine: Engine) -> object:
    return list(engine.chat_stream([{"role": "user", "content": "abc"}], SETTINGS))


@pytest.mark.parametrize("call", [_generate, _stream, _batch, _chat])
def test_a_call_is_interrupted_anywhere(call: Callable[[Engine], object], engine: Engine) -> None:
    expected = engine.generate("abc", SETTINGS).token_ids
    for at in points(instructions(lambda: call(engine))):
        with Interrupt(at).tracing(), suppress(KeyboardInterrupt):
            call(engine)
        check_clean(engine)
        assert engine.generate("abc", SETTINGS).token_ids == expected, f"after an interrupt at instruction {at}"


def test_loading_is_interrupted_anywhere(talker: Path) -> None:
    """What was loaded goes, whether anybody closes it or not."""

    def load() -> None:
        Engine.load(talker, expert_cache=8, threads=1, state_folder="none").close()

    others = set(threading.enumerate())
    for at in points(instructions(load))[::2]:
        with Interrupt(at).tracing(), suppress(KeyboardInterrupt):
            load()
        end = time.monotonic() + HANG_SECONDS
        while any(each.name.startswith("edgemoe") for each in set(threading.enumerate()) - others):
            assert time.monotonic() < end, f"threads are left after an interrupt at instruction {at}"
            time.sleep(0.01)


def test_closing_is_interrupted_anywhere_and_asked_for_again(talker: Path) -> None:
    engine = Engine.load(talker, expert_cache=8, threads=1, state_folder="none")
    for at in range(1, 40):
        with Interrupt(at).tracing(), suppress(KeyboardInterrupt):
            engine.close()
        closing = threading.Thread(target=engine.close)
        closing.start()
        closing.join(HANG_SECONDS)
        assert not closing.is_alive(), f"close waits for ever after an interrupt at instruction {at}"
