"""An engine on a node of a Ray cluster, as seen from here: its calls, what it said last, and whether it is gone."""

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
"""How long a node may take to start the process of an engine."""
CALLS_AT_ONCE = 16
"""Calls that an actor works on at the same time; a batch makes one at a time."""
LOOK_SECONDS = 0.2
"""Between two looks at how far loading is."""


class EngineLost(EdgeMoEError):
    """An engine's process or node is gone, or cannot be reached any more."""


class RemoteEngine:
    """A handle of one actor. `lost` says why it answers no more."""

    def __init__(self, place: Place) -> None:
        self.node = place.node.name
        self.lost: str | None = None
        self.loaded: Loaded | None = None
        self.stats: Stats | None = None
        """The totals that came with the last answer."""
        self._actor = _start(place)
        self._version = self._actor.version.remote()

    def check_version(self) -> None:
        """Waits for the process. Raises EdgeMoEError when it does not begin or runs another edgemoe than this one."""
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
        """The call of `EngineActor.plan`, for `fetch`."""
        return self._actor.plan.remote(factory, model, settings)

    def load(self, factory: type[Engine] | None, model: str | None, settings: Mapping[str, Any]) -> Any:
        """The call of `EngineActor.load`, for `fetch`."""
        return self._actor.load.remote(factory, model, settings)

    def progress(self) -> Any:
        """The call of `EngineActor.progress`, for `fetch`."""
        return self._actor.progress.remote()

    def exchange(
        self, box: int, requests: Sequence[NumberedRequest], cancel_running: bool | None, patience: float
    ) -> Any:
        """The call of `EngineActor.exchange`, for `fetch_exchange`."""
        return self._actor.exchange.remote(box, requests, cancel_running, patience)

    def end(self, box: int) -> None:
        """Tells the actor that nobody waits for the batch `box` any more; does not wait until it knows."""
        if _connected():
            self._actor.end.remote(box)

    def fetch(self, call: Any) -> Any:
        """What a call gives back. Raises what it raised, an EdgeMoEError with the node's name, and EngineLost."""
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
            # It may still live behind a broken link; two engines must not work on the same requests.
            self.kill(_reason(error))
            raise EngineLost(
                f"the engine on node {self.node} is gone ({self.lost}): find out there why, and run again"
            ) from error

    def fetch_exchange(self, call: Any) -> Exchanged:
        """What `exchange` gives back; see `fetch`."""
        exchanged: Exchanged = self.fetch(call)
        self.stats = exchanged.stats
        return exchanged

    def kill(self, why: str) -> None:
        """Ends the actor's process, which gives its memory back. `why` becomes `lost`. Idempotent."""
        if self.lost is None:
            import ray

            self.lost = why
            if _connected():
                ray.kill(self._actor)


def _connected() -> bool:
    """Whether Ray can be called at all. Without a connection its calls would start a cluster of their own."""
    import ray

    return bool(ray.is_initialized())


def _start(place: Place) -> Any:
    """The handle of a new actor. It is there at once; its process comes later."""
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
    """Loads `engines` side by side; sets their `loaded` and `stats`. Raises what the first that fails raises."""
    import ray

    calls = {engine.load(factory, model, settings): engine for engine in engines}
    while calls:
        ready, _ = ray.wait(list(calls), timeout=LOOK_SECONDS)
        for call in ready:
            engine = calls.pop(call)
            loaded: Loaded = engine.fetch(call)
            engine.loaded, engine.stats = loaded, loaded.stats
        if on_progress is not None:
            _report(engines, on_progress)


def _report(engines: Sequence[RemoteEngine], on_progress: Callable[[Progress], None]) -> None:
    """Reports the bytes of all engines that are at the same stage as the first."""
    import ray

    calls = {engine.progress(): engine for engine in engines}
    ready, _ = ray.wait(list(calls), num_returns=len(calls), timeout=LOOK_SECONDS)
    noted = [calls[call].fetch(call) for call in ready]
    current = [progress for progress in noted if progress is not None]
    if current:
        same = [progress for progress in current if progress.stage == current[0].stage]
        on_progress(Progress(same[0].stage, sum(each.done for each in same), sum(each.total for each in same)))


def _reason(error: BaseException) -> str:
    """One sentence of Ray's report: the last error that it quotes, else the one that gives a reason, else the first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    quoted = [line for line in lines if re.match(r"\w*Error: ", line)]
    reasons = [line for line in lines if " because " in line]
    return [*lines[:1], *reasons[:1], *quoted][-1].split(". ")[0].rstrip(".")
