"""A model that is in memory only while it is used."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

from edgemoe.config import EngineConfig
from edgemoe.engine import Engine
from edgemoe.errors import EdgeMoEError
from edgemoe.plan.plan import Plan
from edgemoe.results import Progress

P = ParamSpec("P")
Result = TypeVar("Result")


class Lease:
    """A hold on the engine of a `ModelHost`: the engine is not unloaded while there is one. A context manager."""

    def __init__(self, host: ModelHost, ready: Future[Engine]) -> None:
        self.ready = ready
        """The engine once it is loaded, or the error of loading. It cannot be cancelled: others wait for it too."""
        self._host = host

    def release(self) -> None:
        """Gives the hold up. Idempotent."""
        # In one step, so that of two threads one gives it up.
        host: ModelHost | None = vars(self).pop("_host", None)
        if host is not None:
            host._released()

    def __enter__(self) -> Engine:
        try:
            return self.ready.result()
        except BaseException:
            self.release()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class ModelHost:
    """Loads an engine when it is first asked for, in a thread of its own, and unloads it when nobody uses it.

    All methods may be called from any thread. Use it as a context manager, or call `close`.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        config: EngineConfig | None = None,
        *,
        keep_alive: float | None = None,
        loader: Callable[..., Engine] = Engine.load,
        **settings: Any,
    ) -> None:
        """`model`, `config` and `settings` are those of `Engine.load`, which `loader` stands in for.

        `keep_alive` is for how many seconds without a lease the engine is kept: 0 unloads it at once, None and
        negative numbers never. Raises TypeError for an unknown setting.
        """
        self._model = model
        self._config = (config or EngineConfig()).changed(**settings)
        self._keep_alive = None if keep_alive is None or keep_alive < 0 else keep_alive
        self._loader = loader
        self._lock = threading.Lock()
        # One thread that loads and closes, one after the other: two engines are never in memory at once.
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="edgemoe-host")
        self._ready: Future[Engine] | None = None
        """The engine, or its loading; None while it is unloaded."""
        self._stop = threading.Event()
        """Ends the loading of `_ready`."""
        self._leases = 0
        self._unloads = False
        """Whether the last lease to end unloads, whatever `keep_alive` is."""
        self._timer: threading.Timer | None = None
        self._stopped: list[threading.Timer] = []
        """Timers that have been cancelled or have run out, whose threads may not have ended."""
        self._closed = False
        self._process: int | None = None
        """The process whose thread loads; None before the first loading or planning."""
        self._error: BaseException | None = None
        self._progress: Progress | None = None

    @property
    def state(self) -> str:
        """ "unloaded", "loading" or "ready"."""
        ready = self._ready
        if ready is not None and not ready.done():
            return "loading"
        return "unloaded" if self.engine is None else "ready"

    @property
    def engine(self) -> Engine | None:
        """The engine where it is loaded now; without a lease, it may be closed at any moment."""
        ready = self._ready
        if ready is None or not ready.done() or ready.exception() is not None:
            return None
        engine = ready.result()
        return None if engine.closed else engine

    @property
    def leases(self) -> int:
        """How many leases there are."""
        return self._leases

    @property
    def error(self) -> BaseException | None:
        """The error of the last loading; None where it succeeded or is under way."""
        return self._error

    @property
    def progress(self) -> Progress | None:
        """How far loading is; None where nothing is being loaded, or nothing was read yet."""
        return self._progress if self.state == "loading" else None

    def plan(self) -> Plan:
        """The plan of the loaded engine, else the one that loading would use now. Waits for a loading under way.

        Raises what `Engine.plan_for` raises, and EdgeMoEError after `close`.
        """
        return self.begin_plan().result()

    def begin_plan(self) -> Future[Plan]:
        """As `plan` without waiting: the future has the plan, or its error. Raises EdgeMoEError after `close`."""
        engine = self.engine
        if engine is not None:
            planned: Future[Plan] = Future()
            planned.set_result(engine.plan)
            return planned
        self._check_process()
        with self._lock:
            self._check()
            # Not beside a loading: transformers changes PyTorch's default type for all threads while it builds.
            return self._submit(self._plan)

    def lease(self) -> Lease:
        """A hold on the engine, which is loaded where it is not, or has ended. Does not wait: entering the lease does.

        Entering raises what `Engine.load` raises; the next lease tries again. Raises EdgeMoEError after `close`.
        """
        self._check_process()
        with self._lock:
            ready = self._loading()
            self._leases += 1
            self._stop_timer()
            return Lease(self, ready)

    def load(self) -> Future[Engine]:
        """Begins to load, where it is not loaded; the result waits for the engine. Raises EdgeMoEError after `close`.

        Where no lease follows within `keep_alive` seconds, if that is above 0, the engine is unloaded again. Callbacks
        of the future run in the thread that loads: they may use the host, but not wait for an unloading.
        """
        self._check_process()
        with self._lock:
            # It was asked for after the unloading that waits for leases.
            self._unloads = False
            ready = self._loading()
            if self._timer is not None and self._keep_alive is not None:
                # Its seconds begin anew.
                self._start_timer(self._keep_alive)
            return ready

    def unload(self) -> bool:
        """Unloads and waits for it; where there are leases, the end of the last one unloads. Loading is stopped.

        Returns whether it is unloaded now. Raises EdgeMoEError in a process forked from the one that has used the host.
        """
        self._check_process()
        with self._lock:
            if self._leases and self._ready is not None:
                self._unloads = True
                return False
            ended = self._detach()
        if ended is not None:
            ended.result()
        return True

    def close(self) -> None:
        """Ends the loading or the engine, whoever has a lease, and the thread. Idempotent.

        In a process forked from the one that has used the host it does nothing: the engine is the other's.
        """
        if self._is_forked:
            return
        with self._lock:
            first, self._closed = not self._closed, True
            self._stop_timer()
            if first:
                self._detach()
            stopped = [timer for timer in self._stopped if timer is not threading.current_thread()]
        for timer in stopped:
            timer.join()
        self._worker.shutdown(wait=True)

    def __enter__(self) -> ModelHost:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # A fork has none of the threads, and locks as they were at that moment: it must not wait for either.

    @property
    def _is_forked(self) -> bool:
        return self._process not in (None, os.getpid())

    def _check_process(self) -> None:
        if self._is_forked:
            raise EdgeMoEError("the model host is another process's: make one in this one, after the fork")

    # Below, the lock is held, except where a function is one of the worker's or the timer's.

    def _check(self) -> None:
        if self._closed:
            raise EdgeMoEError("the model host is closed: make another one")

    def _loading(self) -> Future[Engine]:
        self._check()
        if self.state == "unloaded":
            # There may be an engine that has ended.
            self._detach()
        if self._ready is None:
            ready, stop = Future[Engine](), threading.Event()
            ready.set_running_or_notify_cancel()
            self._error = self._progress = None
            self._unloads = False
            try:
                self._submit(self._load, ready, stop)
            except BaseException:
                # No thread could be started: nobody is to wait for it.
                stop.set()
                raise
            self._ready, self._stop = ready, stop
        return self._ready

    def _load(self, ready: Future[Engine], stop: threading.Event) -> None:
        """In the worker."""
        try:
            if stop.is_set():
                raise EdgeMoEError("the model was unloaded before it was loaded: ask again")
            engine = self._loader(self._model, self._config, on_progress=self._on_progress, stop=stop)
        except BaseException as error:
            with self._lock:
                if self._ready is ready:
                    self._ready, self._error = None, error
            ready.set_exception(error)
            return
        with self._lock:
            kept = self._ready is ready
            if kept and not self._leases and self._keep_alive:
                self._start_timer(self._keep_alive)
        if kept:
            # Without the lock: callbacks may ask the host. An unloading that comes between is this thread's next task.
            ready.set_result(engine)
            return
        try:
            engine.close()
        finally:
            ready.set_exception(EdgeMoEError("the model was unloaded while it was loaded: ask again"))

    def _plan(self) -> Plan:
        """In the worker."""
        engine = self.engine
        return engine.plan if engine is not None else Engine.plan_for(self._model, self._config)

    def _on_progress(self, progress: Progress) -> None:
        """In the worker."""
        self._progress = progress

    def _released(self) -> None:
        if self._is_forked:
            return
        with self._lock:
            self._leases -= 1
            if self._leases or self._ready is None or self._closed:
                return
            if self._unloads or self._keep_alive == 0:
                self._detach()
            elif self._keep_alive is not None:
                self._start_timer(self._keep_alive)

    def _start_timer(self, seconds: float) -> None:
        self._stop_timer()
        self._timer = threading.Timer(seconds, self._expire)
        self._timer.name = "edgemoe-host-idle"
        self._timer.daemon = True
        self._timer.start()

    def _stop_timer(self) -> None:
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
            self._stopped = [each for each in self._stopped if each.is_alive()] + [timer]

    def _expire(self) -> None:
        """In the timer."""
        with self._lock:
            # Another one may have been started while this one waited for the lock.
            if self._timer is threading.current_thread() and not self._leases:
                self._detach()

    def _detach(self) -> Future[None] | None:
        """Lets go of the engine or of its loading; the worker closes it. Returns when that is done, if it is."""
        ready, self._ready = self._ready, None
        self._unloads = False
        self._stop_timer()
        if ready is None:
            return None
        self._stop.set()
        return self._submit(_close, ready)

    def _submit(self, function: Callable[P, Result], *arguments: P.args, **named: P.kwargs) -> Future[Result]:
        """Has the worker call `function`."""
        self._process = os.getpid()
        return self._worker.submit(function, *arguments, **named)


def _close(ready: Future[Engine]) -> None:
    """In the worker, after the loading."""
    if ready.exception() is None:
        ready.result().close()
