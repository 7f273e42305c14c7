"""Engines on the nodes of a Ray cluster on this machine's loopback address."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from bench.support.zoo import make
from edgemoe import CheckpointError, Completion, EdgeMoEError, Engine, PlanError, RequestError, Sampling
from edgemoe.cluster.actor import EngineActor, NumberedReply
from edgemoe.cluster.engines import RayEngines
from edgemoe.quiet import quiet_transformers
from edgemoe.results import Progress
from tests.support import ROOT
from tests.support.node_fakes import NodeEngine

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install 'edgemoe[ray]'")
SMALL: dict[str, Any] = {"num_gpus": 0, "object_store_memory": 80 << 20}
TIME = 120.0
"""Timeout in seconds, generous for a busy machine."""


@pytest.fixture(scope="module")
def client_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@pytest.fixture(scope="module")
def cluster(client_port: int) -> Iterator[Any]:
    """A cluster of two nodes, with a server for Ray clients."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", str(ROOT))
        import ray
        from ray.cluster_utils import Cluster

        head = {
            "num_cpus": 4,
            "include_dashboard": False,
            "ray_client_server_port": client_port,
            "min_worker_port": 20000,
            "max_worker_port": 20500,
            "_system_config": {"health_check_period_ms": 500, "health_check_initial_delay_ms": 1000},
        }
        cluster = Cluster(head_node_args=head | SMALL, initialize_head=True)
        try:
            cluster.add_node(num_cpus=2, **SMALL)
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


@pytest.fixture
def connected(cluster: Any) -> Iterator[str]:
    """The address of the cluster, with this process connected to it."""
    import ray

    if not ray.is_initialized():
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.CRITICAL)
        # Ray would report the deaths of nodes on standard output.
        ray._private.worker._worker_logs_enabled = False
    yield cluster.address
    assert ray.is_initialized(), "a connection that was there before was closed"


def load(address: str, model: str = "fake", *, context: int | None = 5, **settings: Any) -> RayEngines:
    """Loads fake engines, which take `context` milliseconds per reply."""
    return RayEngines.load(address, model, context=context, factory=NodeEngine, **settings)  # type: ignore[arg-type]


def asking(prompts: Iterable[str]) -> Iterator[tuple[str, Sampling]]:
    for prompt in prompts:
        yield prompt, Sampling()


def texts(outcomes: Iterable[NumberedReply]) -> dict[int, str]:
    """The replies' texts by number; fails if a request has two."""
    found: dict[int, str] = {}
    for number, outcome in outcomes:
        assert number not in found
        assert isinstance(outcome, Completion)
        found[number] = outcome.text.partition(" ")[2]
    return found


def process(outcome: Completion | RequestError) -> int:
    """The id of the process that answered."""
    assert isinstance(outcome, Completion)
    return int(outcome.text.partition(" ")[0])


def test_every_request_is_answered_once_by_one_of_the_engines(connected: str) -> None:
    prompts = [f"prompt {number}" for number in range(300)]
    seen: list[Progress] = []
    with load(connected, context=1, on_progress=seen.append) as engines:
        outcomes = list(engines.generate_batch(asking(prompts)))
        assert texts(outcomes) == dict(enumerate(prompts))
        shares = Counter(process(outcome) for _, outcome in outcomes)
        assert len(shares) == 2
        assert min(shares.values()) >= 16
        assert engines.stats.requests == 300
        assert engines.stats.batch == 8
        assert engines.stats.batch_reason == "over 2 engines; the first: as asked for"
        assert (engines.has_tokenizer, engines.has_chat_template, engines.plan.context) == (True, False, 1)
        assert list(engines.generate_batch([])) == []
    assert Progress("weights", 60, 200) in seen


def test_errors_of_requests_come_in_their_place(connected: str) -> None:
    with load(connected, context=1, actors=1) as engines:
        outcomes = dict(engines.generate_batch(asking(["bad" if number % 3 == 0 else "good" for number in range(60)])))
    assert sorted(outcomes) == list(range(60))
    assert {number for number, outcome in outcomes.items() if isinstance(outcome, RequestError)} == set(range(0, 60, 3))
    assert str(outcomes[0]) == "bad is no prompt"


def test_requests_are_read_only_a_little_ahead(connected: str) -> None:
    read: list[int] = []

    def endless() -> Iterator[tuple[str, Sampling]]:
        while True:
            read.append(len(read))
            yield "prompt", Sampling()

    with load(connected, context=1) as engines, closing(engines.generate_batch(endless())) as outcomes:
        for taken, _ in zip(range(1, 500), outcomes, strict=False):
            assert len(read) <= taken + 2 * 32  # two engines, two shards of the smallest size each


def test_an_engine_that_dies_has_its_requests_answered_by_the_other(connected: str) -> None:
    prompts = [f"prompt {number}" for number in range(200)]
    with load(connected) as engines:
        outcomes = engines.generate_batch(asking(prompts))
        found = [next(outcomes) for _ in range(20)]
        killed = process(found[-1][1])
        os.kill(killed, signal.SIGKILL)
        found += outcomes
        assert texts(found) == dict(enumerate(prompts))
        assert {process(outcome) for _, outcome in found[-20:]} != {killed}
        # Later batches avoid the lost engine.
        assert texts(engines.generate_batch(asking(prompts[:10]))) == dict(enumerate(prompts[:10]))
        assert engines.stats.requests >= 200


def test_a_node_that_dies_has_its_requests_answered_by_the_others(cluster: Any, connected: str) -> None:
    third = cluster.add_node(num_cpus=8, **SMALL)
    try:
        prompts = [f"prompt {number}" for number in range(200)]
        with load(connected) as engines:
            outcomes = engines.generate_batch(asking(prompts))
            found = [next(outcomes)]
            while len({process(outcome) for _, outcome in found}) < 3:
                found.append(next(outcomes))
            cluster.remove_node(third, allow_graceful=False)
            found += outcomes
        assert texts(found) == dict(enumerate(prompts))
        assert len({process(outcome) for _, outcome in found}) == 3
    finally:
        with suppress(Exception):  # it is gone
            cluster.remove_node(third)
        wait_for_nodes(2)


def wait_for_nodes(count: int) -> None:
    """Waits until the cluster has `count` nodes alive."""
    import ray

    deadline = time.monotonic() + TIME
    while sum(node["Alive"] for node in ray.nodes()) != count:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_when_all_engines_die_what_has_finished_stays(connected: str) -> None:
    prompts = [*(f"prompt {number}" for number in range(20)), "die", *(f"prompt {number}" for number in range(21, 80))]
    found: list[NumberedReply] = []
    with load(connected) as engines:
        outcomes = engines.generate_batch(asking(prompts))
        with pytest.raises(EdgeMoEError, match=r"all engines of the Ray cluster are gone \(node .*--resume"):
            found.extend(outcomes)
        assert 20 not in texts(found)
        assert len(found) >= 10
        with pytest.raises(EdgeMoEError, match="are gone"):
            list(engines.generate_batch(asking(["prompt"])))


@pytest.mark.parametrize(
    ("prompt", "kind", "message"),
    [
        ("fail", ZeroDivisionError, "the engine has a fault"),
        ("unreadable", CheckpointError, r"fetch it again \(on node .*127\.0\.0\.1"),
    ],
)
def test_an_error_of_an_engine_is_raised(connected: str, prompt: str, kind: type[Exception], message: str) -> None:
    with load(connected, actors=1) as engines:
        outcomes = engines.generate_batch(asking(["good", prompt, "good"]))
        assert next(outcomes)[0] == 0
        with pytest.raises(kind, match=message):
            next(outcomes)
        assert texts(engines.generate_batch(asking(["good"]))) == {0: "good"}


def test_an_error_of_the_requests_passes_through(connected: str) -> None:
    def broken() -> Iterator[tuple[str, Sampling]]:
        yield "prompt", Sampling()
        raise UnicodeError("line 2")

    with load(connected, actors=1) as engines:
        with pytest.raises(UnicodeError, match="line 2"):
            list(engines.generate_batch(broken()))
        assert texts(engines.generate_batch(asking(["good"]))) == {0: "good"}


def test_a_cancel_ends_what_is_in_flight(connected: str) -> None:
    with load(connected) as engines:
        started = time.monotonic()
        outcomes = engines.generate_batch(asking(["good"] * 2 + ["long"] * 30))
        found = [next(outcomes), next(outcomes)]
        engines.cancel(running=True)
        found += outcomes
        assert sorted(number for number, _ in found) == list(range(32))
        reasons = Counter(outcome.finish_reason for _, outcome in found if isinstance(outcome, Completion))
        assert reasons == {"stop": 2, "cancelled": 30}
        assert time.monotonic() - started < TIME
        assert texts(engines.generate_batch(asking(["good"]))) == {0: "good"}


def test_a_cancel_of_what_has_not_begun_lets_the_rest_finish(connected: str) -> None:
    with load(connected, actors=1, context=400) as engines:
        outcomes = engines.generate_batch(asking(["good"] * 30))
        found = [next(outcomes)]
        engines.cancel(running=False)
        found += outcomes
    assert sorted(number for number, _ in found) == list(range(30))
    finished = [outcome for _, outcome in found if isinstance(outcome, Completion) and outcome.finish_reason == "stop"]
    assert 2 <= len(finished) < 10
    cancelled = [
        outcome for _, outcome in found if isinstance(outcome, Completion) and outcome.finish_reason == "cancelled"
    ]
    assert all(outcome.token_ids == () for outcome in cancelled)


def test_closing_the_generator_ends_what_is_in_flight(connected: str) -> None:
    with load(connected, actors=1) as engines:
        outcomes = engines.generate_batch(asking(["good", *["long"] * 20]))
        next(outcomes)
        outcomes.close()
        started = time.monotonic()
        assert texts(engines.generate_batch(asking(["good"] * 3))) == {0: "good", 1: "good", 2: "good"}
        assert time.monotonic() - started < TIME / 2


def test_two_batches_run_side_by_side(connected: str) -> None:
    with load(connected, context=1) as engines:
        first = engines.generate_batch(asking(f"first {number}" for number in range(100)))
        second = engines.generate_batch(asking(f"second {number}" for number in range(100)))
        found: list[list[NumberedReply]] = [[], []]
        for one, other in zip(first, second, strict=True):
            found[0].append(one)
            found[1].append(other)
    assert texts(found[0]) == {number: f"first {number}" for number in range(100)}
    assert texts(found[1]) == {number: f"second {number}" for number in range(100)}


def test_a_closed_one_says_so(connected: str) -> None:
    engines = load(connected, actors=1)
    outcomes = engines.generate_batch(asking(["good"] * 20))
    next(outcomes)
    engines.close()
    engines.close()
    with pytest.raises(EdgeMoEError, match="closed"):
        list(outcomes)
    with pytest.raises(EdgeMoEError, match="closed"):
        next(engines.generate_batch(asking(["good"])))


@pytest.mark.parametrize(
    ("model", "kind", "message"),
    [
        ("missing", CheckpointError, r"give another with -m \(on node .*127\.0\.0\.1"),
        ("large", PlanError, r"lower --ctx-size \(on node .*127\.0\.0\.1"),
        ("deadly", EdgeMoEError, r"the engine on node .* is gone"),
    ],
)
def test_an_error_of_loading_comes_as_itself_with_the_node(
    connected: str, model: str, kind: type[EdgeMoEError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        load(connected, model, actors=1)


def test_the_smallest_context_of_the_nodes_holds_for_all(connected: str, tmp_path: Path) -> None:
    with load(connected, str(tmp_path), context=None) as engines:
        assert engines.plan.context == 5


def test_another_version_on_a_node_is_refused(connected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgemoe.cluster.remote_engine.__version__", "9.9.9")
    with pytest.raises(EdgeMoEError, match=r"has edgemoe 0.* and this machine 9\.9\.9: install the same"):
        load(connected)


def test_a_node_without_a_free_cpu_is_named(connected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr("edgemoe.cluster.remote_engine.BEGIN_SECONDS", 1.0)
    greedy: Any = ray.remote(EngineActor).options(num_cpus=4).remote()
    ray.get(greedy.version.remote())
    with pytest.raises(EdgeMoEError, match=r"node .*127\.0\.0\.1.* has begun no engine in 1 s"):
        load(connected, actors=1)
    ray.kill(greedy)


def test_a_node_without_edgemoe_is_named(connected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "only_here.py").write_text("class EngineActor:\n    def version(self):\n        return 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("edgemoe.cluster.remote_engine.EngineActor", import_module("only_here").EngineActor)
    with pytest.raises(
        EdgeMoEError, match=r"node .*127\.0\.0\.1.*No module named 'only_here'.*has edgemoe 0.* installed"
    ):
        load(connected, actors=1)


def test_the_tokens_are_those_of_one_engine(connected: str, tmp_path: Path) -> None:
    with quiet_transformers():
        folder = make("mixtral", tmp_path / "mixtral")
    requests = [
        ([3 + (7 * number + place) % 200 for place in range(1 + number % 9)], Sampling(temperature=0, max_tokens=6))
        for number in range(24)
    ]
    with Engine.load(folder, dtype="float32", threads=1) as engine:
        expected = dict(engine.generate_batch(requests))
    with RayEngines.load(connected, folder, dtype="float32", threads=1) as engines:
        found = dict(engines.generate_batch(requests))
    assert token_ids(found) == token_ids(expected)
    assert engines.plan.model == engine.plan.model


def token_ids(outcomes: dict[int, Completion | RequestError]) -> dict[int, Sequence[int]]:
    return {number: outcome.token_ids for number, outcome in outcomes.items() if isinstance(outcome, Completion)}


SCRIPT = """
import os, signal, sys, threading
from edgemoe import Sampling
from edgemoe.cluster.engines import RayEngines
from tests.support.node_fakes import NodeEngine

before = signal.getsignal(signal.SIGTERM), sys.excepthook
with RayEngines.load(sys.argv[1], "fake", context=1, factory=NodeEngine) as engines:
    assert (signal.getsignal(signal.SIGTERM), sys.excepthook) == before
    found = dict(engines.generate_batch(("prompt", Sampling()) for _ in range(100)))
    assert sorted(found) == list(range(100))
    os.kill(int(found[0].text.split()[0]), signal.SIGKILL)
    assert len(dict(engines.generate_batch(("prompt", Sampling()) for _ in range(100)))) == 100
import ray
assert not ray.is_initialized()
assert threading.enumerate() == [threading.main_thread()]
"""


@pytest.mark.parametrize("client", [False, True], ids=["node", "client"])
def test_a_process_that_connects_prints_nothing_and_leaves_nothing(
    cluster: Any, client_port: int, client: bool
) -> None:
    address = f"ray://127.0.0.1:{client_port}" if client else cluster.address
    script = [sys.executable, "-c", SCRIPT, address]
    done = subprocess.run(script, capture_output=True, text=True, timeout=TIME, cwd=ROOT)
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)
