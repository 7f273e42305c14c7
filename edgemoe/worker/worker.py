"""The thread of an engine: it loads the model and runs the steps, so that whoever waits can be interrupted."""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, Generic, NamedTuple, TypeVar

from edgemoe.errors import EdgeMoEError, without_frames
from edgemoe.plan.memory_keeper import CHECK_SECONDS
from edgemoe.plan.plan import Plan
from edgemoe.request.request import Request
from edgemoe.scheduler.step_loop import PassAborted, StepLoop
from edgemoe.worker.loaded import Loaded

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
            without_frames(error)
            self._error = error
        self.done.put(None)

    def result(self, closed: Callable[[], EdgeMoEError]) -> Result:
        """Raises what the function has raised, and `closed()` where the worker has ended before it."""
        if self._error is not None and not isinstance(self._error, PassAborted):
            raise self._error
        if not self._result:
            raise closed()
        return self._result[0]


class _Demand(NamedTuple):
    """A caller that waits, and what for."""

    satisfied: Callable[[], bool]
    tell: Callable[[], None]


class _Holder(weakref.ref[Any]):
    """What a caller holds of `request`. It tells of its end by a function in C, which no interrupt can end early."""

    __slots__ = ("request",)
    request: Request


_Message = Callable[[StepLoop], None] | _Demand | _Call[Any] | weakref.ref[Any]


class Worker:
    """Runs steps while some caller waits for what they give, and functions between them.

    Model, cache and scheduler are used by its thread alone. Callers send it functions through a queue, which is safe in
    signal handlers, finalizers and any number of threads. Between the layers of a pass the thread looks into the queue:
    what ends requests takes effect there, and a pass that nobody waits for any more is left.
    """

    def __init__(self, load: Callable[[Callable[[], None]], Loaded], owner: object) -> None:
        """`start` runs the thread, which begins with `load`. It ends with `owner`, if nobody closes it before.

        `load` is given a function to call now and then: it raises once the worker is to end.
        """
        self.loaded: Loaded | None = None
        """Set by the thread when the model is loaded; None again at its end."""
        self.closing = False
        """Whether `close` was called."""
        self._load: Callable[[Callable[[], None]], Loaded] | None = load
        self._error: BaseException | None = None
        self._process = os.getpid()
        self._inbox: SimpleQueue[_Message] = SimpleQueue()
        self._owner = weakref.ref(owner, self._inbox.put)
        self._calls: deque[_Call[Any]] = deque()
        self._running_call: _Call[Any] | None = None
        self._demands: list[_Demand] = []
        self._last_plan: Plan | None = None
        self._ready: SimpleQueue[None] = SimpleQueue()
        self._has_ended = False
        self._thread = threading.Thread(target=self._run, name="edgemoe-engine", daemon=True)

    # --- for callers -------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts the thread; see `wait_loaded`. Where the caller is interrupted, the thread may have begun."""
        self._thread.start()

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
        self.join()
        error, self._error = self._error, None
        try:
            raise error or self._closed()
        finally:
            # Its traceback refers to this frame.
            del error

    @property
    def plan(self) -> Plan:
        """The plan of what it runs, or ran last."""
        loaded, last = self.loaded, self._last_plan
        if loaded is not None:
            return loaded.plan
        assert last is not None
        return last

    def check(self) -> Loaded:
        """What it runs. Raises EdgeMoEError after `close`, and in a process forked from the one that loaded it.

        A fork has none of its threads.
        """
        if os.getpid() != self._process:
            raise EdgeMoEError("the engine was loaded by another process: load it in this one, after the fork")
        loaded = self.loaded
        if loaded is None or self.closing:
            raise self._closed()
        return loaded

    @property
    def has_ended(self) -> bool:
        """Whether it takes nothing any more, once it was loaded: after `close`, or an error that ends its thread."""
        return self.closing or self.loaded is None

    def _closed(self) -> EdgeMoEError:
        """The error of a call after the end."""
        error = None if self.closing else self._error
        why = "is closed" if error is None else f"has ended with {type(error).__name__} ({error})"
        raised = EdgeMoEError(f"the engine {why}: load it again with Engine.load")
        raised.__cause__ = error
        return raised

    def post(self, function: Callable[[StepLoop], None]) -> None:
        """Has the thread call `function` between two layers or two steps. Does not wait. It must not raise.

        After `close` nothing is called.
        """
        self._inbox.put(function)

    def call(self, function: Callable[[Loaded], Result]) -> Result:
        """What `function` returns, which the thread calls between two steps, or the error that it raises.

        Raises EdgeMoEError after `close`. Where the caller is interrupted, passes of `function` end at the next layer.
        """
        self.check()
        call = _Call(function)
        self._inbox.put(call)
        if not self._has_ended:
            try:
                call.done.get()
            except BaseException:
                call.withdrawn = True
                self.post(_nothing)
                raise
        return call.result(self._closed)

    def wait(self, satisfied: Callable[[], bool]) -> None:
        """Waits until `satisfied`, and has steps run meanwhile. Raises EdgeMoEError where `close` comes before.

        The thread calls `satisfied` after each step, and after what was posted.
        """
        self.check()
        done: SimpleQueue[None] = SimpleQueue()
        demand = self.tell_when(satisfied, lambda: done.put(None))
        try:
            done.get()
        except BaseException:
            self.post(lambda loop: self._withdraw(demand))
            raise
        if not satisfied():
            raise self._closed()

    def tell_when(self, satisfied: Callable[[], bool], tell: Callable[[], None]) -> _Demand:
        """Has `tell` called once `satisfied`, or after `close`, and has steps run meanwhile.

        The thread calls both; neither may raise or wait.
        """
        demand = _Demand(satisfied, tell)
        self._inbox.put(demand)
        if self._has_ended:
            # Nobody may have read the queue after this.
            tell()
        return demand

    def watch(self, holder: object, request: Request) -> None:
        """Ends `request` once nobody has `holder` any more."""
        reference = _Holder(holder, self._inbox.put)
        # First: an interrupt between the two leaves a reference that nobody has, and that tells nothing.
        reference.request = request
        request.holder = reference

    def prompt_done(self, request: Request) -> int:
        """Tokens of the prompt of `request` that are computed; of those in a pass, in proportion to its layers."""
        loaded, cache = self.loaded, request.cache
        if cache is None or loaded is None or request.generated:
            return request.prompt_length if request.generated else 0
        layers, step = loaded.runtime.layers, loaded.loop.current
        computing = next((part.tokens for part in step.parts if part.request is request), 0) if step else 0
        done = cache.tokens + computing * layers.reached // max(1, layers.in_passes)
        # A pass that has just ended counts in the cache already.
        return min(done, request.prompt_length)

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
            self.join()

    def abandon(self) -> None:
        """As `close` without waiting."""
        self.closing = True
        self.post(_nothing)

    def join(self, seconds: float | None = None) -> None:
        """Waits for the end of the thread, `seconds` at most. Does not wait in a process forked from the first one."""
        if os.getpid() != self._process or self._thread.ident is None:
            return
        # A queue of its own: an interrupt may lose what was taken from a queue.
        ended: SimpleQueue[None] = SimpleQueue()
        self.tell_when(lambda: False, lambda: ended.put(None))
        with suppress(Empty):
            ended.get(timeout=seconds)
            # It tells at its very end, and lives on for a moment: for longer where others have the processors.
            if threading.current_thread() is not self._thread:
                self._thread.join()

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
            self._serve(loaded)
        except BaseException as error:
            # It is kept for as long as the engine is, and known before callers see that nothing is loaded any more.
            without_frames(error)
            self._error = error
        finally:
            self._last_plan, self.loaded = loaded.plan, None
            loaded.close()

    def _end(self) -> None:
        """Tells everybody who waits, now or later."""
        self._has_ended = True
        self._drain(None, wait=False)
        for demand in self._demands:
            demand.tell()
        for call in self._calls:
            call.done.put(None)
        self._demands.clear()
        self._calls.clear()
        self._ready.put(None)

    def _stop_loading(self) -> None:
        if self.closing or self._owner() is None:
            raise PassAborted

    def _serve(self, loaded: Loaded) -> None:
        loop, seconds = loaded.loop, CHECK_SECONDS if loaded.tends_memory else None
        while not self.closing:
            self._drain(loop, wait=not self._demands and not self._calls, seconds=seconds)
            with suppress(PassAborted):
                # It may wait for the link as the engine closes.
                loaded.tend()
            while self._calls and not self.closing:
                self._running_call = self._calls.popleft()
                self._running_call.run(loaded)
                self._running_call = None
            if not self.closing and self._unsatisfied():
                self._step(loaded)
        loop.cancel(lambda request: True)
        self._unsatisfied()

    def _step(self, loaded: Loaded) -> None:
        loaded.runtime.layers.reached = 0
        try:
            loaded.loop.step()
        except BaseException as error:
            # Not of one step's requests alone: nobody is left waiting for what does not come.
            loaded.loop.fail(error)
        self._unsatisfied()

    def _poll(self) -> None:
        """Between two layers: does what callers have posted, and leaves the pass where nobody waits for it."""
        if self._inbox.empty() and not self.closing:
            return
        call, loaded = self._running_call, self.loaded
        assert loaded is not None
        self._drain(loaded.loop, wait=False)
        self._unsatisfied()
        if self.closing or (loaded.loop.nobody_waits if call is None else call.withdrawn):
            raise PassAborted

    def _drain(self, loop: StepLoop | None, *, wait: bool, seconds: float | None = None) -> None:
        """Takes what was posted; without a loop, those who wait alone. `wait` waits for something, or for `seconds`."""
        with suppress(Empty):
            self._take(self._inbox.get(block=wait, timeout=seconds), loop)
            while True:
                self._take(self._inbox.get_nowait(), loop)

    def _take(self, message: _Message, loop: StepLoop | None) -> None:
        if isinstance(message, _Demand):
            self._demands.append(message)
        elif isinstance(message, _Call):
            self._calls.append(message)
        elif isinstance(message, _Holder):
            request = message.request
            if loop is not None:
                loop.cancel(lambda each: each is request)
        elif isinstance(message, weakref.ref):
            self.closing = True
        elif loop is not None:
            message(loop)

    def _unsatisfied(self) -> bool:
        """Wakes the callers that have what they wait for; whether others are left."""
        left = []
        for demand in self._demands:
            if demand.satisfied():
                demand.tell()
            else:
                left.append(demand)
        self._demands = left
        return bool(left)

    def _withdraw(self, demand: _Demand) -> None:
        self._demands = [each for each in self._demands if each is not demand]


def _nothing(loop: StepLoop) -> None:
    """What wakes the thread."""
