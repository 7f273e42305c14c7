"""The connection to a running Ray cluster, and the cluster's places for engines.

Ray is imported only on connecting.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import ModuleType

from edgemoe.errors import EdgeMoEError, PlanError, is_device_or_memory_error

REACH_SECONDS = 5.0
"""Timeout of a connection to the address's port."""
PROBE_SECONDS = 30.0
"""Timeout of the first connection to the cluster, from a process of its own."""
PROBE = """
import sys
sys.path[:] = sys.argv[2:]
try:
    import ray
    ray.init(address=sys.argv[1], log_to_driver=False)
except Exception as error:
    sys.exit(" ".join(str(error).split()))
"""
"""Connects and exits. Ray's own attempt can wait for minutes and writes to the terminal; no option prevents that."""


@dataclass(frozen=True)
class Node:
    """A node that is alive; `identity` is Ray's id of it, `name` is for messages."""

    identity: str
    name: str
    cpus: int
    gpus: int


@dataclass(frozen=True)
class Place:
    """A place for one engine: a GPU of a node, or a node's CPU."""

    node: Node
    on_gpu: bool


class RayCluster:
    """A connection to a Ray cluster. An existing connection of this process is reused, and never closed."""

    def __init__(self, address: str, undo: ExitStack | None = None) -> None:
        """`disconnect` closes `undo`; None is nothing to close."""
        self.address = address
        self._undo = undo or ExitStack()

    @classmethod
    def connect(cls, address: str) -> RayCluster:
        """Connects to "auto", "HOST:PORT" or "ray://HOST:PORT".

        Raises EdgeMoEError if Ray is not installed, the address has another form, or no cluster answers there.
        """
        with _undisturbed():
            ray = _import_ray()
            if ray.is_initialized():
                return cls(address)
            _check_reachable(address)
            if not address.startswith("ray://"):
                _probe(address)
            _connect(ray, address)
        undo = ExitStack()
        undo.enter_context(_silent(ray))
        undo.callback(ray.shutdown)
        return cls(address, undo)

    def places(self, device: str, actors: int | None) -> list[list[Place]]:
        """Places for `actors` engines (None is one per node), in rounds with at most one place per node.

        Nodes with GPUs come first, with one place per GPU; a node without a GPU has one place. Raises PlanError if
        there are fewer places.
        """
        import ray

        nodes = [_node(entry) for entry in ray.nodes() if entry["Alive"]]
        on_gpu = {node: node.gpus > 0 and device != "cpu" for node in nodes}
        usable = [node for node in nodes if on_gpu[node] or (node.cpus > 0 and not device.startswith("cuda"))]
        if not usable:
            wanted = "a GPU" if device.startswith("cuda") else "a CPU"
            raise PlanError(f"no node of the Ray cluster at {self.address} offers {wanted} for device={device!r}")
        usable.sort(key=lambda node: (not on_gpu[node], -node.cpus))
        most = sum(node.gpus if on_gpu[node] else 1 for node in usable)
        count = len(usable) if actors is None else actors
        if not 1 <= count <= most:
            raise PlanError(
                f"{count} engines were asked for and the Ray cluster at {self.address} has places for 1 to {most}, one "
                "on each GPU and on each node without GPUs: ask for so many (actors=), or add nodes"
            )
        rounds: list[list[Place]] = []
        while count:
            left = [node for node in usable if len(rounds) < (node.gpus if on_gpu[node] else 1)][:count]
            rounds.append([Place(node, on_gpu[node]) for node in left])
            count -= len(left)
        return rounds

    def disconnect(self) -> None:
        """Disconnects, unless this process was connected before. Idempotent."""
        self._undo.close()


def _import_ray() -> ModuleType:
    try:
        import ray
    except ImportError as error:
        raise EdgeMoEError(f"address= needs Ray ({error}): pip install 'edgemoe[ray]'") from error
    return ray


def _check_reachable(address: str) -> None:
    """Raises EdgeMoEError for an address of another form, and for one where nothing listens."""
    if address == "auto":
        return
    match = re.fullmatch(r"(?:ray://)?\[?([^\[\]/]+?)\]?:(\d{1,5})/?", address)
    if match is None:
        raise EdgeMoEError(
            f"{address!r} is no address of a Ray cluster: give address=auto, HOST:PORT or ray://HOST:PORT"
        )
    try:
        socket.create_connection((match[1], int(match[2])), REACH_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise _unreachable(address, str(error)) from error


def _probe(address: str) -> None:
    """Connects from another process first, which a timeout can end and whose output is not shown."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", PROBE, address, *sys.path],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PROBE_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise _unreachable(address, f"nothing in {PROBE_SECONDS:.0f} s") from error
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise _unreachable(address, said[-1] if said else f"exit status {done.returncode}")


def _connect(ray: ModuleType, address: str) -> None:
    """Connects this process. Raises EdgeMoEError if that fails."""
    try:
        # Ray's client server sometimes loses the process that it starts for a new client; a second attempt succeeds.
        for attempts_left in (1, 0):
            try:
                ray.init(address=address, log_to_driver=False, logging_level=logging.CRITICAL)
                return
            except ConnectionAbortedError:
                if not attempts_left:
                    raise
    except Exception as error:
        if is_device_or_memory_error(error) and not isinstance(error, OSError):
            raise
        raise _unreachable(address, " ".join(str(error).split())) from error


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Restores what Ray changes in this process on import and connection, and suppresses its warnings."""
    hook, debugger = sys.excepthook, os.environ.get("PYTHONBREAKPOINT")
    in_main = threading.current_thread() is threading.main_thread()
    on_terminate = signal.getsignal(signal.SIGTERM) if in_main else None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.excepthook = hook
        os.environ.pop("PYTHONBREAKPOINT", None)
        if debugger is not None:
            os.environ["PYTHONBREAKPOINT"] = debugger
        if on_terminate is not None:
            signal.signal(signal.SIGTERM, on_terminate)


@contextmanager
def _silent(ray: ModuleType) -> Iterator[None]:
    """Suppresses Ray's messages on the terminal, and the nodes' reports on standard output, which is for results."""
    logger, reports = logging.getLogger("ray"), ray._private.worker
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    # Neither `log_to_driver` nor any other option covers these reports.
    reports._worker_logs_enabled = False
    try:
        yield
    finally:
        reports._worker_logs_enabled = True
        logger.setLevel(level)


def _unreachable(address: str, why: str) -> EdgeMoEError:
    return EdgeMoEError(
        f"no Ray cluster can be used at {address} ({why}): start one with 'ray start --head', or correct address="
    )


def _node(entry: dict[str, object]) -> Node:
    host, ip = str(entry["NodeManagerHostname"]), str(entry["NodeManagerAddress"])
    resources = entry["Resources"]
    assert isinstance(resources, dict)
    return Node(
        identity=str(entry["NodeID"]),
        name=host if host == ip else f"{host} ({ip})",
        cpus=int(resources.get("CPU", 0)),
        gpus=int(resources.get("GPU", 0)),
    )
