"""Connecting to a Ray cluster, and the errors without one. No cluster is started here."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from edgemoe import EdgeMoEError, PlanError
from edgemoe.cluster import ray_cluster
from edgemoe.cluster.engines import RayEngines
from edgemoe.cluster.ray_cluster import RayCluster

GPUS, MANY, FEW, NONE = {"CPU": 8.0, "GPU": 2.0}, {"CPU": 16.0}, {"CPU": 2.0}, {"memory": 1.0}


@pytest.fixture
def ray() -> ModuleType:
    module: ModuleType = pytest.importorskip("ray", reason="Ray is not installed: pip install 'edgemoe[ray]'")
    return module


@pytest.fixture
def port() -> Iterator[int]:
    """A port that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_ray_is_imported_only_when_somebody_connects() -> None:
    script = "import sys, edgemoe, edgemoe.cli.main, edgemoe.cluster.engines; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_a_missing_ray_is_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(EdgeMoEError, match=r"pip install 'edgemoe\[ray\]'"):
        RayEngines.load("auto")


@pytest.mark.parametrize("address", ["", "local", "127.0.0.1", "ray://host", "http://127.0.0.1:1", "a:b"])
def test_another_form_of_address_is_refused(ray: ModuleType, address: str) -> None:
    with pytest.raises(EdgeMoEError, match=r"give address=auto, HOST:PORT or ray://HOST:PORT") as caught:
        RayCluster.connect(address)
    assert repr(address) in str(caught.value)


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}"])
def test_where_nobody_listens_is_said_at_once(ray: ModuleType, form: str, port: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = server.getsockname()[1]
    started = time.monotonic()
    with pytest.raises(EdgeMoEError, match="refused.*start one with 'ray start --head', or correct address=") as caught:
        RayCluster.connect(form.format(closed))
    assert form.format(closed) in str(caught.value)
    assert time.monotonic() - started < 5
    assert not ray.is_initialized()


@pytest.mark.parametrize("address", ["127.0.0.1:99999", "127.0.0.1:0"])
def test_an_impossible_port_is_no_cluster(ray: ModuleType, address: str) -> None:
    with pytest.raises(EdgeMoEError, match="no Ray cluster can be used"):
        RayCluster.connect(address)


def test_a_port_that_is_no_cluster_times_out(
    ray: ModuleType, port: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ray_cluster, "PROBE_SECONDS", 1.0)
    with pytest.raises(EdgeMoEError, match="nothing in 1 s"):
        RayCluster.connect(f"127.0.0.1:{port}")
    assert capfd.readouterr() == ("", "")


def test_no_cluster_on_this_machine_is_said(
    ray: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ray_cluster, "PROBE", "import sys; sys.exit('Could not find any running Ray instance')")
    with pytest.raises(EdgeMoEError, match=r"at auto \(Could not find any running Ray instance\)"):
        RayCluster.connect("auto")
    assert capfd.readouterr() == ("", "")


def places(
    ray: ModuleType, monkeypatch: pytest.MonkeyPatch, nodes: list[dict[str, float]], device: str, actors: int | None
) -> list[list[tuple[str, bool]]]:
    """The rounds of places, each as the number of its node in `nodes` and whether it is a GPU."""
    entries: list[dict[str, Any]] = [
        {"NodeID": str(number), "NodeManagerHostname": "host", "NodeManagerAddress": f"10.0.0.{number}"}
        | {"Resources": resources, "Alive": True}
        for number, resources in enumerate(nodes)
    ]
    dead = dict(entries[0], Alive=False, NodeID="dead")
    monkeypatch.setattr(ray, "nodes", lambda: [*entries, dead])
    rounds = RayCluster("here:1").places(device, actors)
    return [[(place.node.identity, place.on_gpu) for place in side_by_side] for side_by_side in rounds]


@pytest.mark.parametrize(
    ("nodes", "device", "actors", "expected"),
    [
        ([FEW, MANY], "auto", None, [[("1", False), ("0", False)]]),
        ([FEW, MANY], "auto", 1, [[("1", False)]]),
        ([FEW, NONE], "auto", None, [[("0", False)]]),
        ([FEW, GPUS], "auto", None, [[("1", True), ("0", False)]]),
        ([FEW, GPUS], "auto", 3, [[("1", True), ("0", False)], [("1", True)]]),
        ([FEW, GPUS], "cuda", None, [[("1", True)]]),
        ([FEW, GPUS], "cuda", 2, [[("1", True)], [("1", True)]]),
        ([FEW, GPUS], "cpu", None, [[("1", False), ("0", False)]]),
    ],
)
def test_engines_go_to_different_nodes_and_gpus(
    ray: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    nodes: list[dict[str, float]],
    device: str,
    actors: int | None,
    expected: list[list[tuple[str, bool]]],
) -> None:
    assert places(ray, monkeypatch, nodes, device, actors) == expected


@pytest.mark.parametrize(
    ("nodes", "device", "actors", "message"),
    [
        ([FEW, MANY], "auto", 3, "3 engines .* has places for 1 to 2"),
        ([FEW, MANY], "auto", 0, "0 engines .* has places for 1 to 2"),
        ([FEW], "cuda", None, "offers a GPU for device='cuda'"),
        ([NONE], "auto", None, "offers a CPU for device='auto'"),
    ],
)
def test_too_few_places_are_refused(
    ray: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    nodes: list[dict[str, float]],
    device: str,
    actors: int | None,
    message: str,
) -> None:
    with pytest.raises(PlanError, match=message):
        places(ray, monkeypatch, nodes, device, actors)
