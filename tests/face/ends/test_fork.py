"""A process that forks after it has loaded an engine, or has a host that does."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Sequence

import pytest

from edgemoe import EdgeMoEError, Engine, ModelHost, Sampling
from tests.support.checkpoints import PROMPT, Zoo

SAMPLING = Sampling(max_tokens=3, temperature=0)
pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning"),
]


def test_a_fork_is_told_instead_of_hanging(zoo: Zoo) -> None:
    """benoitc/gunicorn#1891: a server that loads the model before it forks its workers."""
    with Engine.load(zoo("mixtral"), expert_cache="20%", device="cpu", state_folder="none") as engine:
        before = engine.generate(PROMPT, SAMPLING).token_ids
        calls: list[Callable[[], object]] = [
            lambda: engine.generate(PROMPT, SAMPLING),
            lambda: next(engine.stream(PROMPT, SAMPLING)),
            lambda: next(engine.generate_batch([(PROMPT, SAMPLING)])),
        ]
        assert in_a_fork(lambda: told(calls, "loaded by another process", engine.close)) == 0
        assert engine.generate(PROMPT, SAMPLING).token_ids == before, "the parent goes on"


@pytest.mark.parametrize("state", ["unloaded", "loading", "ready"])
def test_a_fork_does_not_wait_for_a_host(state: str) -> None:
    gate = threading.Event()

    def load(*_: object, **__: object) -> Engine:
        gate.wait(20)
        return FakeEngine()

    with ModelHost(loader=load) as host:
        loading = host.load()
        if state != "loading":
            gate.set()
            loading.result()
        if state == "unloaded":
            host.unload()
        calls = [host.lease, host.load, host.unload]
        assert in_a_fork(lambda: told(calls, "another process", host.close)) == 0
        gate.set()
        assert host.load().result(), "the parent goes on"


def test_a_host_may_be_made_before_the_fork_that_uses_it() -> None:
    with ModelHost(loader=lambda *_, **__: FakeEngine()) as host:
        assert in_a_fork(lambda: leased(host)) == 0


class FakeEngine(Engine):
    """An engine that is nothing."""

    def __init__(self) -> None:
        pass

    @property
    def closed(self) -> bool:
        """Never."""
        return False

    def close(self) -> None:
        """Ends nothing."""


def in_a_fork(call: Callable[[], int]) -> int:
    """What `call` returns in a forked child, which ends after 10 seconds; 255 where it raises."""
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        code = 255
        try:
            code = call()
        finally:
            # Nothing of pytest may run in the child.
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def told(calls: Sequence[Callable[[], object]], says: str, close: Callable[[], None]) -> int:
    """0 where every call says what is wrong, and `close` returns."""
    for number, call in enumerate(calls):
        try:
            call()
        except EdgeMoEError as error:
            if says not in str(error):
                return 10 + number
        else:
            return 20 + number
    close()
    return 0


def leased(host: ModelHost) -> int:
    """0 where there is an engine."""
    with host.lease() as engine:
        return int(not engine)
