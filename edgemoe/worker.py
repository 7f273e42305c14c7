"""The thread of an engine: it loads the model and runs the steps, so that whoever waits can be interrupted."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Generic, NamedTuple, TypeVar

from edgemoe.errors import EdgeMoEError
from edgemoe.loaded import Loaded
from edgemoe.scheduler.step_loop import PassAborted, StepLoop

Result = TypeVar("Result")
STOP_SECONDS = 0.05
"""How often a caller that waits for a model to be loaded looks whether it is to stop."""


class _Call(Generic[Result]):
    """A function that the worker runs between two steps, and its result."""

    def __init__(self, function: Callable[[Loaded], Result]) -> None:
        self._function = function
        self._result: list[Result] = []
        self._error: BaseException | None = None
        self.withdrawn = False
        """Whether its caller has stopped waiting."""
        self.done: SimpleQueue[None] = SimpleQueue()

    def run(self, loaded: Loaded) -> None:
        try:
            self._result.append(self._function(loaded))
        except BaseException as error:
            self._error = error
        self.done.put(None)

    def result(self) -> Result:
        """Raises what the function has raised, and EdgeMoEError where the worker has ended before it."""
        if self._error is not None and not isinstance(self._error, PassAborted):
            raise self._error
        if not self._result:
            raise closed()
        return self._result[0]


class _Demand(NamedTuple):
    """A caller that waits, and what for."""

    satisfied: Callable[[], bool]
    done: SimpleQueue[None]


def closed() -> EdgeMoEError:
    """The error of a call after the engine's end."""
    return EdgeMoEError("the engine is closed: load it again with Engine.load")


class Worker:
    """Runs steps while some caller waits for what they give, and functions between them.

    Model, cache and scheduler are used by its thread alone. Callers send it functions through a queue, which is safe in
    signal handlers, finalizers and any number of threads. Between the layers of a pass the thread looks into the queue:
    what ends requests takes effect there, and a pass that nobody waits for any more is left.
    """

    def __init__(self, load: Callable[[Callable[[], None]], Loaded]) -> None:
        """Starts the thread, which begins with `load`; see `wait_loaded`.

        `load` is given a function to call now and then: it raises once the worker is to end.
        """
        self.loaded: Loaded | None = None
        """Set by the thread when the model is loaded; None again at its end."""
        self.closing = False
        """Whether `close` was called."""
        self._load: Callable[[Callable[[], None]], Loaded] | None = load
        self._error: BaseException | None = None
        self._process = os.getpid()
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._calls: deque[_Call[object]] = deque()
        self._running_call: _Call[object] | None = None
        self._demands: list[_Demand] = []
        self._ready: SimpleQueue[None] = SimpleQueue()
        self._ended: SimpleQueue[None] = SimpleQueue()
        self._has_ended = False
        self._thread = threading.Thread(target=self._run, name="edgemoe-engine", daemon=True)
        self._thread.start()

    # --- for callers -------------------------------------------------------------------------------

    def wait_loaded(self, stop: threading.Event | None) -> Loaded:
        """Waits for the model, and raises what loading it has raised.

        Once `stop` is set, raises EdgeMoEError at once, and the thread gives back what it has as soon as it can; so it
        does where the caller is interrupted.
        """
        try:
            while True:
                with suppress(Empty):
                    self._ready.get(timeout=None if stop is None else STOP_SECONDS)
                    break
                if stop is not None and stop.is_set():
                    raise EdgeMoEError("the model was not loaded: stop was set")
        except BaseException:
            self.closing = True
            raise
        loaded = self.loaded
        if loaded is not None:
            return loaded
        self._wait_ended()
        error, self._error = self._error, None
        try:
            raise error or closed()
        finally:
            # Its traceback refers to this frame.
            del error

    def check(self) -> Loaded:
        """What it runs. Raises EdgeMoEError after `close`, and in a process forked from the one that loaded it.

        A fork has none of its threads.
        """
        if os.getpid() != self._process:
            raise EdgeMoEError("the engine was loaded by another process: load it in this one, after the fork")
        loaded = self.loaded
        if loaded is None or self.closing:
            raise closed()
        return loaded

    def post(self, function: Callable[[], None]) -> None:
        """Has the thread call `function` between two layers or two steps. Does not wait. It must not raise."""
        self._inbox.put(function)

    def call(self, function: Callable[[Loaded], Result]) -> Result:
        """What `function` returns, which the thread calls between two steps, or the error that it raises.

        Raises EdgeMoEError after `close`. Where the caller is interrupted, passes of `function` end at the next layer.
        """
        self.check()
        call = _Call(function)
        self.post(lambda: self._calls.append(call))  # type: ignore[arg-type]
        if not self._has_ended:
            try:
                call.done.get()
            except BaseException:
                call.withdrawn = True
                self.post(_nothing)
                raise
        return call.result()

    def run_until(self, satisfied: Callable[[], bool]) -> None:
        """Waits until `satisfied`, and has steps run meanwhile; returns at once after `close`.

        The thread calls `satisfied` after each step, and after what was posted.
        """
        demand = _Demand(satisfied, SimpleQueue())
        self.post(lambda: self._demands.append(demand))
        if self._has_ended:
            return
        try:
            demand.done.get()
        except BaseException:
            self.post(lambda: self._withdraw(demand))
            raise

    def close(self) -> None:
        """Ends the thread, which gives everything back, and waits for it. Idempotent.

        A pass that runs is left at its next layer. In a forked process it does nothing: thread and memory are the
        other's.
        """
        self.closing = True
        if os.getpid() != self._process:
            self.loaded = None
            return
        self.post(_nothing)
        if threading.current_thread() is not self._thread:
            self._wait_ended()

    def abandon(self) -> None:
        """As `close` without waiting."""
        self.closing = True
        self.post(_nothing)

    def _wait_ended(self) -> None:
        self._ended.get()
        # For whoever else waits.
        self._ended.put(None)

    # --- in the thread -----------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._load_and_serve()
        except BaseException as error:
            self._error = error
        finally:
            self._end()

    def _load_and_serve(self) -> None:
        load, self._load = self._load, None
        assert load is not None
        loaded = self.loaded = load(self._stop_loading)
        del load
        try:
            loaded.runtime.layers.poll = loaded.runtime.cache.poll = self._poll
            self._ready.put(None)
            self._serve(loaded.loop)
        finally:
            self.loaded = None
            loaded.close()

    def _end(self) -> None:
        """Tells everybody who waits, now or later."""
        self._has_ended = True
        self._drain(wait=False)
        for demand in self._demands:
            demand.done.put(None)
        for call in self._calls:
            call.done.put(None)
        self._demands.clear()
        self._calls.clear()
        self._ready.put(None)
        self._ended.put(None)

    def _stop_loading(self) -> None:
        if self.closing:
            raise PassAborted

    def _serve(self, loop: StepLoop) -> None:
        while not self.closing:
            self._drain(wait=not self._demands and not self._calls)
            while self._calls and not self.closing:
                self._run_call(self._calls.popleft())
            if not self.closing and self._unsatisfied():
                self._step(loop)
        loop.cancel(lambda request: True)
        self._unsatisfied()

    def _step(self, loop: StepLoop) -> None:
        try:
            loop.step()
        except BaseException as error:
            # Not of one step's requests alone: nobody is left waiting for what does not come.
            loop.fail(error)
        self._unsatisfied()

    def _run_call(self, call: _Call[object]) -> None:
        self._running_call = call
        loaded = self.loaded
        assert loaded is not None
        call.run(loaded)
        self._running_call = None

    def _poll(self) -> None:
        """Between two layers: does what callers have posted, and leaves the pass where nobody waits for it."""
        if self._inbox.empty() and not self.closing:
            return
        self._drain(wait=False)
        self._unsatisfied()
        call, loaded = self._running_call, self.loaded
        if self.closing or (call is not None and call.withdrawn):
            raise PassAborted
        if call is None and loaded is not None and loaded.loop.nobody_waits:
            raise PassAborted

    def _drain(self, *, wait: bool) -> None:
        with suppress(Empty):
            self._inbox.get(block=wait)()
            while True:
                self._inbox.get_nowait()()

    def _unsatisfied(self) -> bool:
        """Wakes the callers that have what they wait for; whether others are left."""
        left = []
        for demand in self._demands:
            if demand.satisfied():
                demand.done.put(None)
            else:
                left.append(demand)
        self._demands = left
        return bool(left)

    def _withdraw(self, demand: _Demand) -> None:
        self._demands = [each for each in self._demands if each is not demand]


def _nothing() -> None:
    """What wakes the thread."""
