"""Engines on the nodes of a Ray cluster, used like one."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from edgemoe.cluster.actor import Loaded, NumberedReply
from edgemoe.cluster.ray_cluster import Place, RayCluster
from edgemoe.cluster.remote_engine import RemoteEngine, load_engines
from edgemoe.cluster.sharding import Sharding
from edgemoe.config import EngineConfig, chosen_config
from edgemoe.errors import EdgeMoEError
from edgemoe.results import Progress, Stats
from edgemoe.sampling import Sampling

if TYPE_CHECKING:
    from edgemoe.checkpoint.tokenizer import Prompt
    from edgemoe.engine import Engine
    from edgemoe.plan.plan import Plan

SHARES = ("forecast_recall", "forecast_precision", "lookahead_recall", "lookahead_precision")
"""The fields of `Stats` that are shares, which cannot be summed."""


class RayEngines:
    """One model, loaded on several nodes of a Ray cluster. Requests are shared out; replies come as from one engine.

    Each request is answered exactly once; those of a node that is lost are answered by the others. Use it as a
    context manager, or call `close`.
    """

    def __init__(self, cluster: RayCluster, engines: Sequence[RemoteEngine]) -> None:
        self._cluster = cluster
        self._engines = engines
        self._numbers = itertools.count()
        self._shardings: set[Sharding] = set()
        self._lock = threading.Lock()
        self._closed = False

    @classmethod
    def load(
        cls,
        address: str,
        model: str | os.PathLike[str] | None = None,
        config: EngineConfig | None = None,
        *,
        actors: int | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        factory: type[Engine] | None = None,
        **settings: Any,
    ) -> RayEngines:
        """Loads `model` on `actors` nodes (None: on every one) of the running Ray cluster at `address`.

        `address` is "auto", "HOST:PORT" or "ray://HOST:PORT". A model's folder must be there on every node, by the
        same path. `factory` stands in for the class `Engine` on the nodes; all else is as for `Engine.load`. Where
        `context` is None, the smallest that a node picks holds for all. Raises EdgeMoEError when Ray or the
        cluster cannot be used, and CheckpointError and PlanError with the node's name.
        """
        chosen = chosen_config(config, settings)
        own = vars(chosen) | {"draft_model": _everywhere(chosen.draft_model)}
        return cls._load(RayCluster.connect(address), actors, _everywhere(model), own, on_progress, factory)

    @classmethod
    def _load(
        cls,
        cluster: RayCluster,
        actors: int | None,
        model: str | None,
        settings: dict[str, Any],
        on_progress: Callable[[Progress], None] | None,
        factory: type[Engine] | None,
    ) -> RayEngines:
        engines: list[RemoteEngine] = []
        try:
            everywhere = cluster.places(settings["device"], actors)
            rounds = [[_started(place, engines) for place in places] for places in everywhere]
            for engine in engines:
                engine.check_version()
            settings["context"] = _common_context(engines, factory, model, settings)
            # The plan of an engine must see what those on the same node have taken.
            for side_by_side in rounds:
                load_engines(side_by_side, factory, model, settings, on_progress)
        except BaseException:
            cls(cluster, engines).close()
            raise
        return cls(cluster, engines)

    @property
    def plan(self) -> Plan:
        """The plan of the first engine."""
        return self._first.plan

    @property
    def has_tokenizer(self) -> bool:
        """As `Engine.has_tokenizer`."""
        return self._first.has_tokenizer

    @property
    def has_chat_template(self) -> bool:
        """As `Engine.has_chat_template`."""
        return self._first.has_chat_template

    @property
    def stats(self) -> Stats:
        """The sums over all engines, lost ones included, as of their last answers.

        `batch_reason` and `speculation` are the first's, and recall and precision the means, weighted by steps.
        """
        return _total([engine.stats for engine in self._engines if engine.stats is not None])

    def generate_batch(self, requests: Iterable[tuple[Prompt, Sampling]]) -> Generator[NumberedReply, None, None]:
        """As `Engine.generate_batch`, over all engines. Raises EdgeMoEError when none is left."""
        with self._lock:
            if self._closed:
                raise EdgeMoEError("the engines are closed: load them again with RayEngines.load")
            sharding = Sharding(next(self._numbers), self._engines, requests)
            self._shardings.add(sharding)
        try:
            with closing(sharding.replies()) as replies:
                yield from replies
        finally:
            with self._lock:
                self._shardings.discard(sharding)

    def cancel(self, *, running: bool = True) -> None:
        """As `Engine.cancel`; reaches the engines within a moment, while their replies are being taken. Thread-safe."""
        with self._lock:
            shardings = list(self._shardings)
        for sharding in shardings:
            sharding.cancel(running=running)

    def close(self) -> None:
        """Ends the engines' processes, and the connection unless it was there before. Idempotent.

        A batch that is still under way ends with EdgeMoEError at its next step.
        """
        with self._lock:
            self._closed = True
            shardings = list(self._shardings)
        for sharding in shardings:
            sharding.leave()
        for engine in self._engines:
            engine.kill("closed")
        self._cluster.disconnect()

    def __enter__(self) -> RayEngines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _first(self) -> Loaded:
        loaded = self._engines[0].loaded
        assert loaded is not None
        return loaded


def _started(place: Place, engines: list[RemoteEngine]) -> RemoteEngine:
    """A new engine, which is added to `engines` as well, so that a failure finds it there."""
    engines.append(RemoteEngine(place))
    return engines[-1]


def _total(known: Sequence[Stats]) -> Stats:
    over = f"over {len(known)} engines; the first: " if len(known) > 1 else ""
    said: dict[str, Any] = {"batch_reason": over + known[0].batch_reason, "speculation": known[0].speculation}
    sums = {
        entry.name: sum(getattr(stats, entry.name) for stats in known)
        for entry in fields(Stats)
        if entry.name not in said
    }
    for name in SHARES:
        sums[name] = sum(getattr(stats, name) * stats.steps for stats in known) / max(1, sums["steps"])
    return Stats(**sums, **said)


def _everywhere(model: str | os.PathLike[str] | None) -> str | None:
    """`model` as it can be found from another process's folder, too."""
    if model is not None and Path(model).exists():
        return str(Path(model).absolute())
    return None if model is None else os.fspath(model)


def _common_context(
    engines: Sequence[RemoteEngine], factory: type[Engine] | None, model: str | None, settings: dict[str, Any]
) -> int | None:
    """The context that was asked for, else the smallest that any node's plan has: a request must fit everywhere."""
    if settings["context"] is not None or len(engines) == 1:
        asked: int | None = settings["context"]
        return asked
    calls = [engine.plan(factory, model, settings) for engine in engines]
    plans: list[Plan] = [engine.fetch(call) for engine, call in zip(engines, calls, strict=True)]
    return min(plan.context for plan in plans)
