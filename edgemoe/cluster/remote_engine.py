"""The handle of an engine on a node of a Ray cluster: its calls, its last totals, and whether it is lost."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgemoe.cluster.actor import EngineActor, Exchanged, Loaded, NumberedRequest
from edgemoe.cluster.ray_cluster import Place
from edgemoe.errors import EdgeMoEError
from edgemoe.results import Progress, Stats
from edgemoe.version import __version__

if TYPE_CHECKING:
    from edgemoe.engine import Engine

BEGIN_SECONDS = 60.0
"""Timeout of a node that starts the process of an engine."""
CALLS_AT_ONCE = 16
"""Concurrent calls of one actor. Each batch makes one at a time."""
POLL_SECONDS = 0.2
"""Interval between reports of the progress of loading."""


class EngineLost(EdgeMoEError):
    """An engine's process or node is gone or unreachable."""


class RemoteEngine:
    """The handle of one actor. `lost` is the reason why it is gone; None while it is not."""

    def __init__(self, place: Place) -> None:
        self.node = place.node.name
        self.lost: str | None = None
        self.loaded: Loaded | None = None
        self.stats: Stats | None = None
        """The totals of the last exchange; None before the engine is loaded."""
        self._actor = _start(place)
        self._version = self._actor.version.remote()

    def check_version(self) -> None:
        """Waits for the process. Raises EdgeMoEError if it does not start or has another version of edgemoe."""
        import ray

        ready, _ = ray.wait([self._version], timeout=BEGIN_SECONDS)
        if not ready:
            raise EdgeMoEError(
                f"node {self.node} has begun no engine in {BEGIN_SECONDS:.0f} s: see in 'ray status' what takes its "
                "CPUs and GPUs, and free one"
            )
        try:
            version = self.fetch(self._version)
        except EngineLost as error:
            raise EdgeMoEError(
                f"no engine begins on node {self.node} ({self.lost}): see that the node is up and has "
                f"edgemoe {__version__} installed"
            ) from error
        if version != __version__:
            raise EdgeMoEError(
                f"node {self.node} has edgemoe {version} and this machine {__version__}: install the same on both"
            )

    def plan(self, factory: type[Engine] | None, model: str | None, settings: Mapping[str, Any]) -> Any:
        """Calls `EngineActor.plan`; its result is for `fetch`."""
        return self._actor.plan.remote(factory, model, settings)

    def load(self, factory: type[Engine] | None, model: str | None, settings: Mapping[str, Any]) -> Any:
        """Calls `EngineActor.load`; its result is for `fetch`."""
        return self._actor.load.remote(factory, model, settings)

    def progress(self) -> Any:
        """Calls `EngineActor.progress`; its result is for `fetch`."""
        return self._actor.progress.remote()

    def exchange(
        self, box: int, requests: Sequence[NumberedRequest], cancel_running: bool | None, patience: float
    ) -> Any:
        """Calls `EngineActor.exchange`; its result is for `fetch_exchange`."""
        return self._actor.exchange.remote(box, requests, cancel_running, patience)

    def end(self, box: int) -> None:
        """Calls `EngineActor.end`; does not wait for it."""
        if _connected():
            self._actor.end.remote(box)

    def fetch(self, call: Any) -> Any:
        """Waits for the result of a call.

        Raises the error of the call, an EdgeMoEError with the node's name added, and EngineLost if the engine is gone.
        """
        import ray
        from ray.exceptions import RayError, RayTaskError

        try:
            return ray.get(call)
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, EdgeMoEError):
                raise type(cause)(f"{cause} (on node {self.node})") from cause
            raise cause from error
        except (RayError, ConnectionError) as error:
            # It may still run behind a broken connection, and two engines must not run the same requests.
            self.kill(_reason(error))
            raise EngineLost(
                f"the engine on node {self.node} is gone ({self.lost}): find out there why, and run again"
            ) from error

    def fetch_exchange(self, call: Any) -> Exchanged:
        """Waits for the result of `exchange`, as `fetch` does, and updates `stats`."""
        exchanged: Exchanged = self.fetch(call)
        self.stats = exchanged.stats
        return exchanged

    def kill(self, why: str) -> None:
        """Ends the actor's process, which frees its memory, and sets `lost` to `why`. Idempotent."""
        if self.lost is None:
            import ray

            self.lost = why
            if _connected():
                ray.kill(self._actor)


def _connected() -> bool:
    """Whether Ray is connected. Without a connection, any call of Ray would start a new cluster."""
    import ray

    return bool(ray.is_initialized())


def _start(place: Place) -> Any:
    """Starts an actor at `place`. Returns its handle without waiting for its process."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return (
        ray.remote(EngineActor)
        .options(
            num_cpus=0 if place.on_gpu else 1,
            num_gpus=1 if place.on_gpu else 0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(place.node.identity, soft=False),
            max_concurrency=CALLS_AT_ONCE,
        )
        .remote()
    )


def load_engines(
    engines: Sequence[RemoteEngine],
    factory: type[Engine] | None,
    model: str | None,
    settings: Mapping[str, Any],
    on_progress: Callable[[Progress], None] | None,
) -> None:
    """Loads `engines` in parallel and sets their `loaded` and `stats`. Raises the error of the first that fails."""
    import ray

    calls = {engine.load(factory, model, settings): engine for engine in engines}
    while calls:
        ready, _ = ray.wait(list(calls), timeout=POLL_SECONDS)
        for call in ready:
            engine = calls.pop(call)
            loaded: Loaded = engine.fetch(call)
            engine.loaded, engine.stats = loaded, loaded.stats
        if on_progress is not None:
            _report(engines, on_progress)


def _report(engines: Sequence[RemoteEngine], on_progress: Callable[[Progress], None]) -> None:
    """Reports the sum of the bytes of all engines at the stage of the first."""
    import ray

    calls = {engine.progress(): engine for engine in engines}
    ready, _ = ray.wait(list(calls), num_returns=len(calls), timeout=POLL_SECONDS)
    noted = [calls[call].fetch(call) for call in ready]
    current = [progress for progress in noted if progress is not None]
    if current:
        same = [progress for progress in current if progress.stage == current[0].stage]
        on_progress(Progress(same[0].stage, sum(each.done for each in same), sum(each.total for each in same)))


def _reason(error: BaseException) -> str:
    """One sentence of Ray's report: the last quoted error, else the first line with "because", else the first line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    quoted = [line for line in lines if re.match(r"\w*Error: ", line)]
    reasons = [line for line in lines if " because " in line]
    return [*lines[:1], *reasons[:1], *quoted][-1].split(". ")[0].rstrip(".")
