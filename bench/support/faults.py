"""Faults of disks and links, put around an engine's store and link; and what must hold after any of them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from edgemoe import Engine
from edgemoe.cache import ExpertId, ExpertStore, Link, Transfer
from edgemoe.cache.link import Priority
from edgemoe.cache.store import Piece
from edgemoe.checkpoint.blueprint import blueprint_for
from edgemoe.config import EngineConfig
from edgemoe.runtime import Transports


class Faults:
    """The fault that store and link have now; none to begin with. It is set and lifted from any thread."""

    def __init__(self) -> None:
        self.read: Callable[[], None] | None = None
        """Called in the place of every read; it raises, or waits."""
        self.transfer: BaseException | None = None
        """The error of every transfer that starts."""
        self.after = 0
        """Reads or transfers that go well before the fault."""
        self.hung: threading.Event | None = None
        """What lets reads that hang return."""

    def lift(self) -> None:
        """No fault from now on; reads that hang return."""
        self.read = self.transfer = None
        self.after = 0
        if self.hung is not None:
            self.hung.set()

    def due(self) -> bool:
        """Whether the fault takes effect now."""
        self.after -= 1
        return self.after < 0

    @property
    def transports(self) -> Transports:
        """What has these faults."""
        return Transports(partial(FaultyStore, faults=self), partial(FaultyLink, faults=self))


class FaultyStore(ExpertStore):
    """The records of another store, read with faults."""

    def __init__(self, inner: ExpertStore, faults: Faults) -> None:
        self.layouts, self.experts = inner.layouts, inner.experts
        self._inner = inner
        self._faults = faults

    def pieces(self, expert: ExpertId, slot: torch.Tensor) -> Sequence[Piece]:
        """See the base class."""
        return [(nbytes, partial(self._move, move)) for nbytes, move in self._inner.pieces(expert, slot)]

    def close(self) -> None:
        """See the base class."""
        self._inner.close()

    def _move(self, move: Callable[[], None]) -> None:
        fault = self._faults.read
        if fault is not None and self._faults.due():
            fault()
        move()


class FaultyLink(Link):
    """Another link, whose transfers fail while there is a fault."""

    def __init__(self, inner: Link, faults: Faults) -> None:
        self._inner = inner
        self._faults = faults
        self._failed: set[Transfer] = set()

    def __getattribute__(self, name: str) -> Any:
        if name in ("busy_seconds", "bytes_moved", "device_wait_seconds"):
            return getattr(object.__getattribute__(self, "_inner"), name)
        return object.__getattribute__(self, name)

    def start(self, expert: ExpertId, slot: int, memory: torch.Tensor, priority: Priority) -> Transfer:
        """See the base class."""
        error = self._faults.transfer
        if error is None or not self._faults.due():
            return self._inner.start(expert, slot, memory, priority)
        failed = Transfer(expert, slot, memory.nbytes, priority)
        failed.error, failed.done = error, True
        self._failed.add(failed)
        return failed

    def promote(self, transfer: Transfer) -> None:
        """See the base class."""
        if transfer not in self._failed:
            self._inner.promote(transfer)

    def cancel(self, transfer: Transfer) -> bool:
        """See the base class."""
        return transfer not in self._failed and self._inner.cancel(transfer)

    def wait_any(self, transfers: Sequence[Transfer], seconds: float | None = None) -> list[Transfer]:
        """See the base class."""
        failed = [each for each in transfers if each in self._failed]
        self._failed.difference_update(failed)
        return failed or self._inner.wait_any(transfers, seconds)

    def released(self, slots: Sequence[int]) -> None:
        """See the base class."""
        self._inner.released(slots)

    def released_all(self) -> None:
        """See the base class."""
        self._inner.released_all()

    def close(self) -> None:
        """See the base class."""
        self._inner.close()


def load(model: Path | str | None, faults: Faults, stop: threading.Event | None = None, **settings: Any) -> Engine:
    """An engine with `faults`; otherwise as `Engine.load`."""
    config = EngineConfig(device="cpu", state_folder="none").changed(**settings)
    return Engine(partial(blueprint_for, model, config), config, lambda progress: None, stop, faults.transports)


def broken_laws(engine: Engine) -> list[str]:
    """What does not hold of an engine that nobody uses: slots, pins, KV bytes, requests. Empty where all is well."""
    runtime = engine._runtime
    if runtime is None:
        return ["the engine is closed"]
    cache = runtime.cache

    def look(loop: Any) -> list[str]:
        scheduler, found = loop.scheduler, list[str]()
        if scheduler.running or scheduler.waiting:
            found.append(f"{scheduler.running} requests run and {scheduler.waiting} wait")
        try:
            cache.check_integrity()
        except AssertionError as error:
            found.append(str(error))
        pinned = [expert for expert, held in cache._held.items() if held.pins]
        if pinned:
            found.append(f"pinned: {pinned}")
        kept = sum(scheduler.kv.charged(each.cache) for each in scheduler._prefixes.kept)
        if scheduler.kv.nbytes != kept:
            found.append(f"{scheduler.kv.nbytes} bytes of KV cache are charged, and {kept} are kept")
        return found

    return engine._between_steps(look)


def open_files() -> int:
    """File descriptors of this process; 0 where the system does not tell."""
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return 0


def own_threads() -> list[str]:
    """Names of the threads that engines of this process have."""
    return sorted(each.name for each in threading.enumerate() if each.name.startswith("edgemoe"))
